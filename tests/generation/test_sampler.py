"""The sampler: decoding with a cache and merged adapters gives the answers of the model in its training form."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from favchat_jax.checkpoints.mistral_folder import read_config, read_weights, write_weights
from favchat_jax.checkpoints.run import Assembly
from favchat_jax.data.conversation import Conversation, PromptEncoder
from favchat_jax.errors import UserError
from favchat_jax.generation.sampler import Sampler, Sampling
from favchat_jax.generation.weights import from_training
from favchat_jax.models import favchat
from tests.models.tiny_parts import MISTRAL, config_json, drawn_flat, favchat_shapes, tiny_config

QUESTIONS = ("What colour is the hair?", "Is the person happy?", "Which hat?", "Does a person with glasses nod?")
LONGEST = 10  # tokens of an answer
GREEDY = Sampling(LONGEST)
BUCKET = 64


def train_tokenizer():
    """Trains byte pairs on QUESTIONS, so that single tokens can be parts of a character."""
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(["[INST] <Video> </Video> [/INST] <Image> </Image>", *QUESTIONS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Setting:
    """A tiny model in its training form with effective adapters, and its answers from full forward passes."""

    def __init__(self, folder, variant="v1", sizes=MISTRAL):
        self.tokenizer = train_tokenizer()
        llm = {**config_json(sizes), "vocab_size": len(self.tokenizer)}
        (folder / "config.json").write_text(json.dumps(llm))
        sizes = {"data.buckets": (BUCKET,), "model.qformer.vocabulary": len(self.tokenizer)}
        self.config = tiny_config(f"variant={variant}").updated({"llm.path": str(folder), **sizes})
        rank = self.config.model.lora.rank
        self.model = favchat.build(self.config.model, read_config(folder), variant=variant, lora_rank=rank)
        weights = drawn_flat(favchat_shapes(self.model, 2, 32), spread=0.4)
        base = {path: leaf for path, leaf in weights.items() if path.startswith("llm/") and "lora" not in path}
        write_weights(folder, unflatten_dict(base, sep="/")["llm"])
        stored = flatten_dict(read_weights(folder), sep="/")
        self.weights = {**weights, **{f"llm/{path}": jnp.asarray(leaf) for path, leaf in stored.items()}}
        self.frames = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), np.uint8)
        qformer = self.config.model.qformer
        self.visual_tokens = qformer.queries + qformer.extra_queries
        self.prompt = PromptEncoder(self.tokenizer, self.config.data.prompt_length)
        self.step = jax.jit(self._step)

    def parts(self, tokenizer):
        conversation = Conversation(tokenizer, self.visual_tokens)
        llm = read_config(self.config.llm.path)
        return Assembly(self.config, llm, self.model, tokenizer, conversation, self.prompt)

    def sampler(self, tokenizer):
        return Sampler(self.parts(tokenizer), self.decoding_form(self.weights))

    def decoding_form(self, weights):
        return from_training(weights, self.config, read_config(self.config.llm.path))

    def _step(self, weights, frames, tokens, prompt, mask, last):
        """Returns the likeliest token after position `last` in a forward pass of the full sequence, without a cache."""

        def scores(model, *inputs):
            return model.llm.logits(model(*inputs).hidden[0, 0, last])

        params = {"params": unflatten_dict(weights, sep="/")}
        return jnp.argmax(self.model.apply(params, frames, tokens, prompt, mask, method=scores))

    def written(self, clip, turns, tokenizer):
        """Returns ids of LONGEST tokens, whether or not an end is among them."""
        tokens = list(Conversation(tokenizer, self.visual_tokens).encode(turns, 2, BUCKET).tokens)
        prompt, mask = self.prompt.encode(turns[-1][0])
        start = len(tokens)
        for _ in range(LONGEST):
            padded = np.zeros((1, 1, BUCKET + LONGEST), np.int32)
            padded[0, 0, : len(tokens)] = tokens
            clip_frames, last = self.frames[clip : clip + 1], len(tokens) - 1
            tokens.append(int(self.step(self.weights, clip_frames, padded, prompt[None, None], mask[None, None], last)))
        return tokens[start:]


def asked(question):
    return [(question, None)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def written(setting):
    """The ids from full forward passes for two questions about each of two clips."""
    return [
        [setting.written(clip, asked(question), setting.tokenizer) for question in QUESTIONS[:2]] for clip in range(2)
    ]


@pytest.fixture(scope="module")
def tokenizer(written):
    """A tokenizer whose end of text is a later token of some answers and is missing from others."""
    tokenizer, rows = train_tokenizer(), [ids for answers in written for ids in answers]
    end = next(id for id in rows[0] if not any(id in ids[:2] for ids in rows) and any(id not in ids for ids in rows))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


@pytest.fixture(scope="module")
def text(setting, tokenizer):
    """Decodes ids up to the end among them."""

    def text(ids):
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        return setting.tokenizer.decode(ids[:end]).strip()

    return text


@pytest.fixture(scope="module")
def sampler(setting, tokenizer):
    return setting.sampler(tokenizer)


@pytest.fixture(scope="module")
def features(setting, sampler):
    return sampler.encode(setting.frames)


@pytest.fixture(scope="module")
def answers(sampler, features):
    return sampler.answer(features, [[asked(question) for question in QUESTIONS[:2]]] * 2, GREEDY)


def of_clip(features, clip):
    return jax.tree.map(lambda leaf: leaf[clip : clip + 1], features)


def test_greedy_answers_are_the_likeliest_tokens_of_full_forward_passes_in_the_training_form(answers, written, text):
    assert answers == [[text(ids) for ids in rows] for rows in written]
    assert len({answer for rows in answers for answer in rows}) > 2


def test_greedy_answers_of_v2_are_those_of_full_forward_passes_too(tmp_path):
    setting = Setting(tmp_path, "v2")
    sampler = setting.sampler(setting.tokenizer)
    expected = []
    for question in QUESTIONS[:2]:
        ids = setting.written(1, asked(question), setting.tokenizer)
        end = ids.index(setting.tokenizer.eos_token_id) if setting.tokenizer.eos_token_id in ids else LONGEST
        expected.append(setting.tokenizer.decode(ids[:end]).strip())
    conversations = [[asked(question) for question in QUESTIONS[:2]]] * 2
    assert sampler.answer(sampler.encode(setting.frames), conversations, GREEDY)[1] == expected


def test_a_question_that_the_qformers_read_in_part_is_answered_with_one_warning(sampler, features, caplog):
    long = f"Tell me {'really ' * 40}who this is."
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sampler.stream_weights(features, [[QUESTIONS[2], long]] * 2)
    (line,) = [record.getMessage() for record in caplog.records if "Q-Formers" in record.getMessage()]
    assert line.startswith(f"the Q-Formers miss the first {sampler.prompt.cut(long)} tokens") and line.endswith(long)


def test_stream_weights_are_those_of_the_complete_model(setting, sampler, features):
    weights = sampler.stream_weights(features, [QUESTIONS[:2]] * 2)
    prompts, masks = zip(*(setting.prompt.encode(question) for question in QUESTIONS[:2]), strict=True)
    ids = np.zeros((2, 2, 8), np.int32)
    expected = setting.model.apply(
        {"params": unflatten_dict(setting.weights, sep="/")},
        setting.frames,
        ids,
        np.array([prompts] * 2),
        np.array([masks] * 2),
    ).stream_weights.mean(2)
    np.testing.assert_allclose(weights, expected, atol=1e-5)


def trained_log_p(setting, sampler, clip, turns):
    """Returns the log-probabilities of the last answer's tokens from a full forward pass in the training form."""

    def scores(model, *inputs):
        return jax.nn.log_softmax(model.llm.logits(model(*inputs).hidden[0, 0]))

    encoded = sampler.conversation.encode(turns, 2, 1000)
    start = len(sampler.conversation.encode([*turns[:-1], (turns[-1][0], None)], 2, 1000).tokens)
    prompt, mask = setting.prompt.encode(turns[-1][0])
    inputs = (setting.frames[clip : clip + 1], encoded.tokens[None, None], prompt[None, None], mask[None, None])
    params = {"params": unflatten_dict(setting.weights, sep="/")}
    logs = np.asarray(setting.model.apply(params, *inputs, method=scores))
    places = np.arange(start, len(encoded.tokens))  # the answer and its end
    return logs[places - 1, encoded.tokens[places]]


def test_log_likelihoods_of_answers_are_those_of_full_forward_passes_in_the_training_form(setting, sampler, features):
    turns, answers = asked(QUESTIONS[0]), ("yes", "the hair is brown", "")
    with pytest.raises(UserError, match="is empty"):
        sampler.log_likelihoods(features, [turns, turns], answers)
    found = sampler.log_likelihoods(features, [turns, asked(QUESTIONS[1])], answers[:2])
    for clip, answer in np.ndindex(2, 2):
        expected = trained_log_p(setting, sampler, clip, [(QUESTIONS[clip], answers[answer])])
        np.testing.assert_allclose(found[clip, answer], expected.sum(), rtol=1e-4)


def test_the_loss_of_an_answer_of_any_length_is_its_negative_log_likelihood_per_token(setting, sampler, features):
    later, long = [("Who?", "a"), (QUESTIONS[1], "the hair is brown")], [(QUESTIONS[2], "yes " * BUCKET)]
    conversations = [[[(QUESTIONS[0], "yes")], later], [long]]
    losses = sampler.losses(features, conversations)
    assert [len(row) for row in losses] == [2, 1]
    for clip, turns, found in (
        (0, conversations[0][0], losses[0][0]),
        (0, later, losses[0][1]),
        (1, long, losses[1][0]),
    ):
        np.testing.assert_allclose(found, -trained_log_p(setting, sampler, clip, turns).mean(), rtol=1e-4)


def test_the_likelihood_of_an_answer_depends_on_the_turns_before_it_and_not_on_the_other_answers(sampler, features):
    last = asked("Hat?")
    turns = [("Who?", "a"), *last]
    several = sampler.log_likelihoods(features, [turns] * 2, ("b", "no"))
    alone = sampler.log_likelihoods(features, [turns] * 2, ("b",))
    np.testing.assert_allclose(several[:, :1], alone, rtol=1e-4)
    assert not np.allclose(alone, sampler.log_likelihoods(features, [last] * 2, ("b",)))


def test_an_answer_ends_before_the_end_of_text_and_others_keep_their_length(setting, answers, written, tokenizer):
    lengths = set()
    for rows, texts in zip(written, answers, strict=True):
        for ids, answer in zip(rows, texts, strict=True):
            length = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else LONGEST
            assert answer == setting.tokenizer.decode(ids[:length]).strip()
            lengths.add(length)
    assert min(lengths) < LONGEST == max(lengths)


def test_a_question_has_the_same_answer_in_a_batch_and_alone(sampler, features, answers):
    for clip, number in np.ndindex(2, 2):
        alone = sampler.answer(of_clip(features, clip), [[asked(QUESTIONS[number])]], GREEDY)
        assert alone == [[answers[clip][number]]]


def test_clips_may_have_different_numbers_of_questions(sampler, features, answers):
    first, second = (asked(question) for question in QUESTIONS[:2])
    assert sampler.answer(features, [[second], [first, second]], GREEDY) == [[answers[0][1]], answers[1]]


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("number", [0, 1])
def test_a_streamed_answer_is_the_answer_piece_by_piece(sampler, features, answers, clip, number):
    pieces = list(sampler.stream(of_clip(features, clip), asked(QUESTIONS[number]), GREEDY))
    assert "".join(pieces) == answers[clip][number]
    assert len([piece for piece in pieces if piece]) > 1


def test_a_character_of_several_tokens_is_streamed_in_one_piece(setting, sampler, features, monkeypatch):
    written = "a na\u00efve \u4f60 hat"
    ids = setting.tokenizer.encode(written, add_special_tokens=False)
    monkeypatch.setattr(sampler, "blocks", lambda *_: iter(np.array(ids)[:, None, None]))
    pieces = list(sampler.stream(of_clip(features, 0), asked(QUESTIONS[0]), GREEDY))
    assert "".join(pieces) == written
    assert not [piece for piece in pieces if "\ufffd" in piece]
    assert len([piece for piece in pieces if piece]) > 4


def test_an_answer_in_a_conversation_reads_the_turns_before_it(setting, sampler, features, answers, tokenizer, text):
    turns = [(QUESTIONS[2], "no"), (QUESTIONS[1], None)]
    expected = text(setting.written(0, turns, tokenizer))
    assert expected != answers[0][1]
    assert sampler.answer(of_clip(features, 0), [[turns]], GREEDY) == [[expected]]


def test_sampled_answers_follow_the_seed(sampler, features):
    texts = [
        sampler.answer(of_clip(features, 0), [[asked(QUESTIONS[0])]], Sampling(LONGEST, temperature=2.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_responses_of_a_group_are_all_the_answer_with_the_end_repeated(tokenizer, sampler, features, answers):
    ids = sampler.responses(features, [QUESTIONS[0], QUESTIONS[1]], 3, GREEDY)
    assert ids.shape == (2, 3, LONGEST)
    for clip in range(2):
        assert [sampler.text(row) for row in ids[clip]] == [answers[clip][clip]] * 3
    for row in ids.reshape(6, -1):
        ended = np.flatnonzero(row == tokenizer.eos_token_id)
        assert not len(ended) or (row[ended[0] :] == tokenizer.eos_token_id).all()


def test_drawn_responses_of_a_group_differ_and_follow_the_seed(sampler, features):
    groups = [
        sampler.responses(features, QUESTIONS[:2], 4, Sampling(LONGEST, temperature=2.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert len({tuple(row) for row in groups[0].reshape(8, -1)}) > 4
    np.testing.assert_array_equal(groups[0], groups[1])
    assert (groups[0] != groups[2]).any()


def test_answers_come_from_the_weights_that_were_loaded_last(setting, tokenizer, features, answers):
    sampler = setting.sampler(tokenizer)
    ask = [[asked(question) for question in QUESTIONS[:2]]] * 2
    other = {path: -leaf if "lora_b" in path else leaf for path, leaf in setting.weights.items()}
    sampler.unload()
    sampler.load(setting.decoding_form(other))
    assert sampler.answer(features, ask, GREEDY) != answers
    sampler.load(setting.decoding_form(setting.weights))
    assert sampler.answer(features, ask, GREEDY) == answers


def test_nothing_compiles_for_another_clip_question_or_way_of_drawing(setting, sampler, features, answers, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(1.0)
        control = [record for record in caplog.records if "ompil" in record.getMessage()]
        caplog.clear()
        again = sampler.encode(setting.frames[::-1].copy())
        conversations = [[asked(question) for question in QUESTIONS[2:]]] * 2
        sampler.answer(again, conversations, Sampling(LONGEST, temperature=0.7, top_p=0.9, seed=3))
        compiled = [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]
    assert control, "compilations are not logged"
    assert not compiled


def test_a_question_longer_than_the_context_is_refused_with_its_length(sampler, features):
    with pytest.raises(UserError, match=f"question is .* over the limit of {BUCKET}"):
        sampler.answer(of_clip(features, 0), [[asked("hair " * 100)]], GREEDY)


def test_an_empty_question_is_refused(sampler, features):
    with pytest.raises(UserError, match="question is empty"):
        sampler.answer(of_clip(features, 0), [[asked(" ")]], GREEDY)


def test_the_repetition_penalty_counts_all_tokens_of_the_answer(sampler, features):
    def tokens(penalty):
        how = Sampling(LONGEST, repetition_penalty=penalty)
        return np.concatenate(list(sampler.blocks(of_clip(features, 0), [[asked(QUESTIONS[0])]], how, 3)), axis=1)[0]

    plain = tokens(1.0).tolist()
    favoured = tokens(1e-6).tolist()  # so far below 1 that tokens that the answer has already come first
    assert len(favoured) == LONGEST and set(favoured) == set(plain[:2]) != set(plain)


def test_an_answer_ends_before_a_stop_text_streamed_or_not(sampler, features):
    conversation = asked(QUESTIONS[1])
    whole = sampler.answer(of_clip(features, 0), [[conversation]], GREEDY)[0][0]
    assert len(whole) > 6
    for stop in (whole[3:6], whole[-2:], whole[0]):
        how = dataclasses.replace(GREEDY, stop=("never there", stop))
        expected = whole[: whole.find(stop)].strip()
        assert sampler.answer(of_clip(features, 0), [[conversation]], how)[0][0] == expected
        assert "".join(sampler.stream(of_clip(features, 0), conversation, how)) == expected


@pytest.mark.parametrize(
    ("text", "shown"), [("a <", "a "), ("a </an", "a "), ("a </answer", "a "), ("a </b", "a </b"), ("a ", "a ")]
)
def test_text_that_may_begin_a_stop_text_is_held_back(text, shown):
    assert Sampling(stop=("</answer>",)).settled(text) == shown


@pytest.mark.parametrize(
    "wrong", [{"top_k": -1}, {"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")}, {"stop": ("",)}]
)
def test_a_way_to_draw_that_is_none_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
