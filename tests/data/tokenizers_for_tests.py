"""Makes small tokenizers of the kinds that published models have."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What colour is the hair of the person? The hair is black.",
    "Which emotion does the face show? The person looks happy and nods.",
    "[INST] <Video> </Video> [/INST] <Image> </Image> Describe the video in detail.",
    "The video contains 8 frames sampled at 0.0, 0.5, 1.2 seconds.",
]


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token per word. Ids: <unk> 0, <s> 1, </s> 2, then `vocabulary`."""
    ids = {word: number for number, word in enumerate(("<unk>", "<s>", "</s>", *vocabulary))}
    engine = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_pairs(kind: str = "bytes") -> PreTrainedTokenizerFast:
    """Trains a byte-pair tokenizer of a kind: `bytes` (like GPT-2), `v0.2` or `v0.3` (like Mistral's files)."""
    special = ["<unk>", "<s>", "</s>"] + (["[INST]", "[/INST]"] if kind == "v0.3" else [])
    engine = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
    elif kind == "v0.2":
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        engine.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        engine.decoder = decoders.Metaspace()
    else:
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        engine.decoder = decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [chr(c) for c in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bert(*vocabulary: str) -> PreTrainedTokenizerFast:
    """Makes BERT's word-piece tokenizer: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then `vocabulary`."""
    ids = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary))}
    engine = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer()
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=engine, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
