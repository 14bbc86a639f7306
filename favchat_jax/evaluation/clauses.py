"""Splits a free-text answer into clauses, and weighs the names that each clause mentions.

A clause ends at a mark or a conjunction; a comma within a list does not end it. Within its clause, a name can be denied
("not happy"), weakened ("a hint of joy") or singled out ("mainly joy"). A complete clause can be a supposition ("if he
is happy") or a concession ("although he is happy"). `phrases.py` lists the words for each, `labels.py` the names.
"""

import enum
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from favchat_jax.evaluation import phrases

# Returns the begin, end and label of each name in a clause, in order; the second text is the clause's key.
Find = Callable[[str, str], list[tuple[int, int, str]]]

REACH = 300  # characters around a name that can bear on it; models that repeat themselves write endless clauses


class Weight(enum.IntEnum):
    """How much a mention counts: those of the highest weight decide."""

    NONE = 0  # a supposition, an option, a comparison, or taken back
    SLIGHT = 1  # a trace, a beginning, a possibility, a concession
    SAID = 2
    NAMED = 3  # "the emotion is", "I think"
    CHOSEN = 4  # "mainly", "fits best", or a name alone
    ANSWER = 5  # "answer:"
    FINAL = 6  # "final answer", "in conclusion"


@dataclass
class Mention:
    """A name in an answer, with its label, whether it is denied, its weight, and whether it is a clause by itself."""

    label: str
    denied: bool
    weight: Weight
    is_headline: bool = False


@dataclass(frozen=True)
class Clause:
    """A clause of an answer.

    Attributes:
        text: its words and commas, separated by blanks.
        openers: kinds of the conjunctions before it, the groups of `phrases.OPENER`; "comma" for a comma.
        key: the words before the colon or the bracket that introduces it, or "".
        mark: the mark that ends its part of the sentence, such as "?" or ":".
        is_first: whether it begins a sentence.
        is_alone: whether no other clause is between the same two marks.
        is_aside: whether it is in parentheses.
    """

    text: str
    openers: frozenset[str]
    key: str
    mark: str
    is_first: bool
    is_alone: bool
    is_aside: bool


def mentions(text: str, find: Find, answers: tuple[str, str] | None = None) -> list[Mention]:
    """Returns all mentions of names in an answer, in order, with the weights that the complete answer gives them.

    A "but" lowers what its sentence has said before, a "however" at the beginning of a sentence everything before, and
    "no, wait" takes everything before back. A yes or no decides a question before it.

    Args:
        text: the answer, as `phrases.plain` returns it.
        find: finds the names in a clause.
        answers: the labels of yes and of no, each of which is the denial of the other; None if names have no opposite.
    """
    said: list[Mention] = []
    asked: list[Mention] = []  # mentions in a question or before a colon, to which a yes or no replies
    bare: list[Mention] = []  # a yes or no in this sentence, which a name in it would make precise
    sentence = 0  # number of mentions before this sentence
    turned: int | None = None  # the first mention that a pending "but" lowers
    is_taken_back = False
    for clause in clauses(text, find):
        if clause.is_first:
            sentence, turned, bare = len(said), None, []
        if "contrast" in clause.openers and turned is None:
            turned = 0 if clause.is_first else sentence
        found = weighed(clause, find, answers)
        reply = None if found else says_yes(clause.text)
        if reply is not None and len({mention.label for mention in asked}) == 1:
            for mention in asked:
                mention.weight = Weight.SAID
                if not reply:
                    _deny(mention, answers)
        elif reply is not None and answers:
            bare = found = [Mention(answers[not reply], False, _weight(clause, clause.text, ""))]
        is_taken_back |= phrases.RETRACTION.match(clause.text) is not None
        is_taken_back |= answers is None and not asked and clause.text == "no"
        if any(mention.weight >= Weight.SAID and not mention.denied for mention in found):
            if is_taken_back:
                _lower(said, Weight.FINAL, Weight.NONE)
            elif turned is not None:
                _lower(said[turned:], Weight.NAMED, Weight.SLIGHT)
            if found is not bare:
                _lower(bare, Weight.NAMED, Weight.NONE)
            turned, is_taken_back = None, False
        said += found
        if clause.mark in ("?", ":") or found or reply is not None:
            asked = found if clause.mark in ("?", ":") else []
    headlines = [mention for mention in said if mention.is_headline]
    if len({mention.label for mention in headlines}) > 1:  # a list of options, each perhaps with a remark
        _lower(headlines, Weight.CHOSEN, Weight.SLIGHT)
    return said


def clauses(text: str, find: Find) -> Iterator[Clause]:
    """Yields the clauses of a text in order; `find` tells lists of names from clauses."""
    before, key, is_begun = ".", "", False
    for part in re.finditer(r"([^.!?;:()]*)([.!?;:()]|$)", text):
        content, mark = part[1].strip(), part[2]
        split = list(_split(content, find))
        for number, (openers, clause) in enumerate(split):
            yield Clause(
                clause,
                openers,
                key if openers <= {"comma"} else "",
                mark,
                is_first=number == 0 and before in ".!?;",
                is_alone=len(split) == 1,
                is_aside=is_begun and before == "(" and mark == ")",
            )
        is_begun |= bool(content)
        if content or mark != ")":
            before, key = mark, split[-1][1] if split and mark in (":", "(") else ""


def _split(content: str, find: Find) -> Iterator[tuple[frozenset[str], str]]:
    """Yields the clauses between two marks, each with the kinds of its openers."""
    begin, openers = 0, frozenset[str]()
    for opener in [*phrases.OPENER.finditer(content), None]:
        pieces = [piece.strip() for piece in content[begin : opener and opener.start()].split(" , ")]
        pieces = [piece.strip(" ,") for piece in pieces if piece.strip(" ,")]
        for number, piece in enumerate(_with_lists(pieces, find)):
            yield openers if number == 0 else frozenset({"comma"}), piece
        if opener:
            openers = frozenset({opener.lastgroup}) if pieces else openers | {opener.lastgroup}
            begin = opener.end()


def _with_lists(pieces: Sequence[str], find: Find) -> list[str]:
    """Joins the pieces between commas that belong to one list of names: "sad" and "angry or afraid"."""
    joined = list(pieces[:1])
    rest = list(pieces[1:])
    while rest:
        length, is_closed = 0, False
        for piece in rest:
            is_closed = _closes_list(piece, find)
            if not is_closed and not _is_item(piece, find):
                break
            length += 1
            if is_closed:
                break
        if is_closed or length > 1:
            joined[-1] = " , ".join([joined[-1], *rest[:length]])
            rest = rest[length:]
        else:
            joined.append(rest.pop(0))
    return joined


def _is_item(piece: str, find: Find) -> bool:
    """Returns whether a piece is a name alone."""
    for begin, end, _ in find(piece, "")[:1]:
        return not phrases.LIST_WORD.sub("", piece[:begin]).strip() and not piece[end:].strip()
    return False


def _closes_list(piece: str, find: Find) -> bool:
    """Returns whether a piece is the end of a list: "or afraid", "angry or afraid of him"."""
    found = find(piece, "")
    if not found or phrases.LIST_WORD.sub("", piece[: found[0][0]]).strip():
        return False
    links = phrases.COORDINATOR.findall(piece)
    is_led = phrases.COORDINATOR.match(piece) is not None
    return is_led or (len({label for _, _, label in found}) > 1 and bool(links)) or "or" in links


def weighed(clause: Clause, find: Find, answers: tuple[str, str] | None) -> list[Mention]:
    """Returns the mentions of names in a clause, weighed by the words around them."""
    found = find(clause.text, clause.key)
    made = []
    for number, (begin, end, label) in enumerate(found):
        before, after = clause.text[max(0, begin - REACH) : begin].rstrip(), clause.text[end : end + REACH]
        following = found[number + 1][0] if number + 1 < len(found) else len(clause.text)
        denial = _denial(before, after)
        made.append(Mention(label, False, _weight(clause, before[:denial].rstrip(), clause.text[end:following])))
        if denial is not None:
            _deny(made[-1], answers)
            _lower(made[-1:], Weight.FINAL, Weight.NONE if re.search(phrases.UNDECIDED, before) else Weight.FINAL)
    if len({mention.label for mention in made if not mention.denied}) > 3:  # the options
        _lower(made, Weight.FINAL, Weight.NONE)
    if clause.is_aside and answers is None:
        _lower(made, Weight.FINAL, Weight.SLIGHT)
    if clause.mark == "?":
        _lower(made, Weight.FINAL, Weight.SLIGHT if phrases.GUESS.search(clause.text) else Weight.NONE)
    rest = clause.text
    for begin, end, _ in reversed(found):
        rest = rest[:begin] + rest[end:]
    if clause.is_alone and not clause.is_aside and not phrases.HEADLINE.sub("", rest).strip():
        for mention in made:
            mention.weight = max(mention.weight, Weight.CHOSEN) if mention.weight else mention.weight
            mention.is_headline = True
    return made


def _denial(before: str, after: str) -> int | None:
    """Returns where the words before a name deny it, their end if the words after it do; None without a denial."""
    if phrases.DENIED_AFTER.match(after):
        return len(before)
    *_, last = [None, *phrases.DENIAL.finditer(before)]
    if last is None:
        return None
    between = before[last.end() :]
    has_own_verb = phrases.OWN_VERB.search(between) and not phrases.REPORT.search(between)
    return None if phrases.NOUN_DENIAL.fullmatch(last[0]) and has_own_verb else last.start()


BEFORE = {
    Weight.NONE: phrases.NONE,
    Weight.SLIGHT: phrases.SLIGHT,
    Weight.NAMED: phrases.NAMED,
    Weight.CHOSEN: phrases.CHOSEN,
    Weight.ANSWER: phrases.ANSWER,
    Weight.FINAL: phrases.FINAL,
}
AFTER = {Weight.CHOSEN: phrases.CHOSEN_AFTER, Weight.SLIGHT: phrases.SLIGHT_AFTER}  # the last one counts


def _weight(clause: Clause, before: str, after: str) -> Weight:
    """Returns the weight of a mention from the words before it in its clause and after it up to the next mention."""
    if "supposition" in clause.openers:
        return Weight.NONE
    if phrases.SLIGHT.search(clause.key):
        return Weight.SLIGHT
    context = f"{clause.key} : {before}" if clause.key else before
    places = {weight: cue.end() for weight, cues in BEFORE.items() for cue in cues.finditer(context)}
    weight = max(places, key=places.__getitem__, default=Weight.SAID)
    for other, cues in AFTER.items():
        if cues.search(after):
            weight = other
    if "result" in clause.openers and weight >= Weight.SAID:
        weight = max(weight, Weight.CHOSEN)
    if clause.openers & {"concession", "reason"}:
        weight = min(weight, Weight.SLIGHT)
    return weight


def says_yes(text: str) -> bool | None:
    """Returns whether a clause is a yes or a no, such as "definitely not"; None if it is neither."""
    if re.search(phrases.UNDECIDED, text):
        return None
    if phrases.SO.search(text):
        return not phrases.DENIAL.search(text)
    text = " ".join(phrases.BELIEF.sub("", text).split())
    claim = " ".join(phrases.SURE.sub("", text).split())
    if phrases.NO.fullmatch(claim):
        return False
    if phrases.YES.fullmatch(claim) or (text and not claim):
        return True
    last = phrases.LAST.search(claim)
    return None if last is None or phrases.COORDINATOR.search(claim) else (last[1] or last[2]) in ("yes", "true")


def _deny(mention: Mention, answers: tuple[str, str] | None) -> None:
    """Denies a mention; if names have opposites, it then mentions the opposite."""
    if answers:
        mention.label = answers[mention.label == answers[0]]
    else:
        mention.denied = not mention.denied


def _lower(said: Sequence[Mention], most: Weight, weight: Weight) -> None:
    """Lowers the weight of earlier mentions that count at most `most`."""
    for mention in said:
        if mention.weight <= most:
            mention.weight = min(mention.weight, weight)
