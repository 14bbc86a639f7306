"""Lists the words by which an answer denies, weakens, contrasts or announces a name; `clauses.py` applies them.

All patterns match `plain` text: small letters, single blanks around words and marks, no contractions ("is not").
"""

import re
import unicodedata


def words(*patterns: str) -> re.Pattern[str]:
    """Compiles alternative patterns of complete words."""
    return re.compile(rf"(?<!\S)(?:{'|'.join(patterns)})(?!\S)")


# Words that begin a clause of their own after "and", and verbs that a denied noun does not take with it.
SUBJECT = "i|he|she|they|it|we|this|these|that|those|the|there|his|her|their|both|my|one"
VERB = (
    "is|are|was|were|has|have|had|seems?|looks?|appears?|feels?|shows?|does|do|did|can|could|would|will|may|might|"
    "suggests?|indicates?|conveys?|expresses|displays?|becomes?|turns?|points?|remains?|implies|signals?|reveals?|fits?"
)

SPELLINGS = (
    (r"[‘’ʼ´`]", "'"),
    (r"</?\w+>|[*#~\\${}\[\]]", " "),
    (r"\bcan ?not\b|\bcan'?t\b", "can not"),
    (r"\bwon'?t\b", "will not"),
    (r"\bain'?t\b", "is not"),
    (r"\b(is|are|was|were|do|does|did|would|could|should|has|have|had)n'?t\b", r"\1 not"),
    (r"\b(it|he|she|that|there|this|what|here|who|one)'s\b", r"\1 is"),
    (r"'re\b", " are"),
    (r"\bi'm\b", "i am"),
    (r"'d\b", " would"),
    (r"'ll\b", " will"),
    (r"'ve\b", " have"),
    (r"'s\b|(?<!\w)'|'(?!\w)", " "),
    (r"\be\.g\.|\bi\.e\.", " "),
    (r"\b(mr|mrs|ms|dr|vs)\.", r"\1"),
    (r"(\d)[.,](\d)", r"\1\2"),
    (r"(?m)^\s*(?:[-•·–]|\(?(?:[a-z]|\d{1,2})[.)])\s+", ""),  # bullets and numbers
    (r"\s-+>?\s|--+|[–—=→|]|=>", " : "),
    (r"/", " , "),
    (r"\n+", " . "),
    (r"([.,;:!?()])", r" \1 "),
    (r"(?<=\w) > (?=\w)", " rather than "),
    (r"[^\w,;:.!?()%' ]|_", " "),
)
# Phrases in which a negation denies nothing, or that other words say more simply.
IDIOMS = (
    (r"can not help(?: but)?|can not but", ""),
    (r"(?:can|could) not (?:hide|conceal|contain|suppress|mask|disguise|deny|mistake|miss)", ""),
    (r"(?:can|could) not (?:be|look|seem|feel|get|appear)(?: any)?(?= more| \w+er\b)", "is"),
    (r"not (?:only|just|merely|simply|solely)", ""),
    (
        r"(?:not|no|never|hardly|little|without|beyond)(?: \w+)? "
        r"(?:doubt(?:s|ful)?|question|mistaking|denying|hesitation)(?: about (?:it|that|this))?(?: that)?",
        "",
    ),
    (
        r"(?:not|no|never|hardly)(?: \w+)? (?:without|devoid of|lack(?:ing)?(?: of)?|unlikely|far from|free of|absent)",
        "",
    ),
    (r"(?:not|never) (?:\w+ ){0,3}?(?:anything|nothing) (?:but|except|other than)", "only"),
    (r"(?:nothing|none|no \w+) but|(?:nothing|none|no)(?: \w+){0,4}? (?:except|other than|apart from)", "only"),
    (r", (?:is|are|does|do|was|has|can) (?:not )?(?:it|he|she|they)(?: not)? \?", "."),
    (r"less ((?:\w+ ){1,3}?)than", r"not \1but"),
    (r"not so much ((?:\w+ ){1,3}?)as|not ((?:\w+ ){1,3}?)so much as", r"not \1\2but"),
    (r"more ((?:of )?(?:an? )?(?:\w+ ){1,2}?)than", r"mainly \1rather than"),
    (r"from ((?:\w+ ){1,3}?)to", r"at first \1then"),
    (r"but(?: (?:there|he|she|it) (?:is|are))? also|as well as", "and"),
    (
        r"(?:if|when) i (?:had|have|were|was|am|must)(?: to)? (?:choose|pick|guess|decide|select|name|say|asked|forced)"
        r"(?: to (?:choose|pick|guess|decide))?|if (?:pressed|forced to choose)",
        "i choose",
    ),
    (r"(?<=\w )i (?:would |can )?conclude", ", i conclude"),
    (r"i would be(?: \w+)? surprised if (it|they|this|these) (?:was|were|is|are) not", r"\1 are"),
    (r"i would be(?: \w+)? surprised if", "i doubt that"),
    (r"in no \w+(?= (?:do|does|is|are|can|could))", "not"),
    (r"i am(?: very| so)? (?:happy|glad|pleased|delighted|sorry|afraid|surprised)(?= (?:to|that|i|but|,|for))", ""),
    (
        r"(?:happy|glad) to help|happy birthday|surprise party|to (?:my|our) surprise|not surprising(?:ly)?|"
        r"no (?:wonder|surprise)|(?<!\w )(?:sadly|happily|surprisingly) ,|i (?:fear|worry)",
        "",
    ),
    (rf"(yes|no|nope|yeah)(?= (?:{SUBJECT}|different|distinct|not|two) )", r"\1 ,"),
)


def plain(text: str) -> str:
    """Returns a text in small letters, its words and marks separated by single blanks, without contractions."""
    text = unicodedata.normalize("NFKC", text).casefold()
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    text = re.sub(r"(^|[.;:!?] )([^.;:!?]*?) , however ,", r"\1however , \2", " ".join(text.split()))
    for pattern, spelling in IDIOMS:
        text = words(pattern).sub(spelling, text)
    return " ".join(text.split())


# The conjunctions that begin a clause, in groups by what they do.
OPENER = words(
    r"(?P<contrast>(?<!anything )but|however|yet|nevertheless|nonetheless|still(?= ,)|that said|on the other hand|"
    rf"instead(?! of)|rather(?= (?:,|{SUBJECT}) )|in fact|in reality|on the contrary)",
    r"(?P<concession>(?:although|(?<!as )though|even though|even if|despite|in spite of|while|whereas|albeit|"
    r"regardless of|aside from|apart from|besides)(?! ,))",
    r"(?P<reason>(?:because|since|as(?= (?:he|she|they|it|the|there) )|due to|given|considering|when|after|before|"
    r"once|until)(?! ,))",
    rf"(?P<result>so(?= (?:{SUBJECT}|yes|no|in) )|hence|thus|therefore|consequently|accordingly)",
    r"(?P<supposition>(?<!as )if|whether|unless|supposing)",
    rf"(?P<link>which|who|whose|then|(?<!one )and(?= (?:{SUBJECT}|{VERB}|then|so|yet|not|no|rather|instead) ))",
)
COORDINATOR = words("or|nor|and")
LIST_WORD = words("or|nor|and|any|an?|the|of|even|very|overtly|particularly|signs?|visible|clear|strong|real|just")

DENIAL = words(
    "not|no|never|without|neither|nor|none|hardly|barely|scarcely|nothing|lack(?:s|ing)?|absence|devoid",
    "free (?:of|from)|rather than|instead of|as opposed to|far from|anything but|unlikely|improbable|implausible",
    r"impossible|doubt(?:s|ful)?|too \w+ (?:for|to (?:be|look|seem))|unlike|other than|than|fails? to",
    "incorrect|false|untrue|(?:hard|difficult) to (?:believe|imagine|see)|(?:mistake|error|wrong) to|no ?(?:body|one)",
    "inconsistent with|(?:exclud|dismiss|reject)(?:e|es|ed|ing)?|rul(?:e|es|ed|ing) out",
)
# A denial of a noun does not reach a verb of its own ("without a smile she looks sad"), unless a word reports it.
NOUN_DENIAL = words("no|without|lack|absence|devoid|free (?:of|from)|none|unlike|than|rather than|instead of")
OWN_VERB = words(VERB)
REPORT = words(r"that|to|of|think|suggest\w*|evidence|sign|indication|chance|way|reason|hint")
DENIED_AFTER = re.compile(
    r"^(?: (?!that |which |and |but )[\w,]+){0,5}? (?:"
    r"(?:is|are|was|were|does|do|did|can|could|would|will|seems?|has) (?:\w+ )?not|"
    r"(?:is|are|was|were|seems?|appears?|be) (?:\w+ )?(?:absent|lacking|missing|unlikely|improbable|excluded|wrong|"
    r"incorrect|impossible|out|ruled|nowhere)|not (?:present|visible|seen|there|evident|detected|observed))(?!\S)"
)

# What stands before a name. Of several, the one nearest to the name counts.
UNDECIDED = (
    r"not (?:\w+ )?(?:sure|certain|convinced)|unsure|uncertain|unclear|not know|not necessarily|"
    r"(?:hard|difficult|impossible) to (?:say|tell|know|judge|determine|decide|discern)|"
    r"(?:can not|unable to|not able to|not possible to) (?:\w+ )?(?:tell|say|determine|confirm|verify|identify|judge|"
    r"decide|know|conclude|rule out|exclude|be (?:sure|certain))"
)
NONE = words(
    UNDECIDED,
    r"confus\w+ (?:\w+ )?(?:with|for)|mistak\w+ (?:\w+ )?for|(?<!second )thought|assumed|expected",
    r"going to say|would have(?! to)|supposed to|pretend\w*|feign\w*|fak(?:e|es|ing)|forced",
    "(?:try|tries|trying) to (?:look|seem|appear)",
    r"versus|vs|compared (?:to|with)|between|among|out of|over(?: an?)?$",
    "options|choices|candidates|possibilities|categories|alternatives",
)
SLIGHT = words(
    r"(?:hints?|touch|traces?|bit|tinge|note|flicker|glimpse|shade|undertones?|elements?|degree|undercurrent|moment|"
    r"flash|suggestion) of|some(?: \w+)?$|less$|with(?: an?)?$|slight(?:ly)?|subtle|faint(?:ly)?|mild(?:ly)?|a little",
    "somewhat|part(?:ly|ially)|also|almost|nearly|(?:bordering|verging) on|(?:tinged|mixed|laced|mingled) with",
    "second(?:ary|arily|$)|minor|alternative|less likely|similar to|close to|as if|as though",
    "initial(?:ly)?|previous(?:ly)?|earlier",
    "(?:at )?first(?! (?:video|clip|half|part|segment|one|person|man|woman|choice|pick))",
    "beg[iau]ns?|beginning|start(?:s|ed|ing)?|brief(?:ly)?|momentar(?:y|ily)|at times|occasional(?:ly)?|sometimes",
    "(?:returns?|back) to|(?<!not )possib(?:le|ly)|perhaps|maybe|might|may|could(?! not|$)",
    "(?:afraid|scared) of|(?:surprised|disgusted|angry|shocked|saddened) (?:at|by|about)",
)
NAMED = words(
    r"(?:emotion|expression|feeling|mood|state)s? (?:\w+ ){0,4}?(?:is|was|as|of)|my (?:guess|impression)",
    "i (?:would )?(?:think|believe|guess|feel|suppose|find)|likely|probably|clearly|obviously|definitely|evidently",
    "just|only|simply|purely|really|actually|truly",
)
CHOSEN = words(
    r"dominant|dominat\w+|main(?:ly)?|primar(?:y|ily)|predominant(?:ly)?|mostly|most|chief(?:ly)?|principal(?:ly)?",
    "prevailing|overriding|overwhelming(?:ly)?|strongest|best|closest|closer to|more(?: of an?)?$|above all",
    "especially|first and foremost|in fact|essentially|in essence|points? to|labell?ed|classified",
    "(?:right|correct) (?:label|class|answer|emotion|choice|word)|first (?:choice|pick)",
    "i (?:would |will |am )?(?:rather )?(?:go|going|choose|choosing|pick|opt|label|settle|lean|leaning|classify)",
    "i (?:would |will |can )?(?:call|say|vote|rate|select|conclude|describe|categori[sz]e|identify|assign)",
)
ANSWER = words(
    r"(?:answer|label|class|classification|category|prediction|choice|option|emotion|expression|result|output|"
    r"response|mood|feeling|ans|a)(?: \w+){0,3} :|answer (?:is|would be|should be|must be)"
)
FINAL = words(
    "final(?:ly)? (?:answer|label|decision|verdict|classification|choice|emotion|prediction)|verdict|boxed|overall",
    "(?:in|to) conclu(?:sion|de)|conclusion|in summary|to sum up|all in all|in the end|ultimately|taken together",
    "all things considered",
)
# What stands after a name.
CHOSEN_AFTER = words(
    r"(?:pre)?dominat\w+|prevails?|prevailing|wins|stands out|above all|most of all|first and foremost|best|it is",
    r"(?:is|are|being|as|remains|seems|would be|feels) (?:\w+ ){0,2}?(?:best|most|main|dominant|predominant|prevailing|"
    r"primary|strongest|stronger|leading|key|overriding|clearest|final|better|answer|choice|pick|label|closest|right|"
    r"correct|appropriate|likely|likeliest|it)",
    r"fits? (?:\w+ )?(?:best|better|most|it)|(?:matches|describes) (?:\w+ )?best",
)
SLIGHT_AFTER = words(
    "before|earlier|previously|at (?:first|the (?:very )?(?:start|beginning|outset))|initially|in the beginning",
    "early on|for a moment|briefly",
    "turn(?:s|ed|ing)?|chang(?:es|ed|ing)|shift(?:s|ed|ing)|becomes?|gives? way|gave way|fad(?:es|ed)",
    r"disappear(?:s|ed)|vanish(?:es|ed)|too|as well|(?:is |are )?also(?: \w+)?|could be|might be|may be",
    "second (?:choice|place|guess|option|candidate|possibility)|runner up|to (?:some|a lesser) (?:degree|extent)",
    "is (?:possible|secondary|minor|faint|subtle|slight)",
)
# A question with one of these is a cautious answer.
GUESS = words("possib(?:le|ly)|perhaps|maybe|might|may|probably|likely")
# The words beside a name that stands alone, such as "probably sadness" or "option b sadness 80 %".
HEADLINE = words(
    "an?|the|very|probably|likely|most|definitely|clearly|certainly|maybe|perhaps|i|think|believe|guess|would|say|just",
    r"option|expression|face|look|emotion|simply|pure|plain|of|,|\w|\d+|\d* ?%",
)
# What takes everything before it back.
RETRACTION = words(
    "(?:no |hmm |oh )?(?:wait|actually|hold on|scratch that|strike that|correction|on second thoughts?|on reflection|"
    "on closer (?:look|inspection)|sorry|i mean|i take that back|let me correct|hmm)"
)

# A bare yes or no, after `BELIEF` and `SURE` are left out.
_CLAIM = "(?:they|these|it|he|she|both|this|that) (?:are|is|do|does)"
YES = words(f"yes|yeah|yep|yup|affirmative|(?:that is )?(?:correct|right|true)|{_CLAIM}")
NO = words(
    f"no|nope|nah|negative|false|incorrect|not(?: really| at all| a chance)?|no (?:way|chance)|{_CLAIM} not|unlikely",
    "doubtful|improbable|impossible|hardly|i doubt (?:it|that|so)|(?:that is )?not (?:correct|right|true|so)",
    "(?:i )?(?:think|believe|guess) not",
)
LAST = words("(yes|true|no|false)(?: from me| for me)?$|^(yes)")
SO = words("(?:think|believe|guess|suppose|say|assume|looks|seems|appears) (?:so|like it)")
SURE = words(
    "likely|probably|most|definitely|certainly|absolutely|indeed|of course|sure|surely|exactly|clearly|very|quite"
)
BELIEF = words("i (?:would )?(?:think|believe|guess|suppose|bet|assume|say)(?: that)?")
