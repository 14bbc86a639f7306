"""Lists the figures printed in the paper (arXiv 2503.09158), for comparison with ours.

They come from the first version unless a comment names the later one. Each table keeps the paper's order of models,
FaVChat last. Shares are in percent.
"""

from typing import Any

Table = tuple[tuple[Any, ...], ...]


def _table(text: str) -> Table:
    """Parses lines of a model, a bar and its figures; "-" is a missing figure, None in the table."""
    rows = (line.split("|") for line in text.strip().splitlines())
    return tuple(
        (model.strip(), *(None if figure == "-" else float(figure) for figure in figures.split()))
        for model, figures in rows
    )


# Table 1: DFEC. An LLM judge's scores from 0 to 5, then n-grams and events.
DFEC = _table(
    """
    VideoLLaMA 7B       | 3.60  3.67  3.84  3.50  0.189  0.196  0.303
    VideoChat 7B        | 3.47  3.52  3.92  3.38  0.251  0.192  0.344
    VideoChat2 7B       | 3.70  3.56  4.16  3.52  0.202  0.229  0.311
    Chat-UniVI 7B       | 3.64  3.63  4.21  3.61  0.189  0.231  0.396
    LLaVA-Next-Video 7B | 4.19  4.07  4.39  4.04  0.250  0.249  0.395
    ShareGPT4Video 7B   | 4.24  4.13  4.35  4.09  0.192  0.205  0.394
    LLaMA-VID 7B        | 3.95  4.01  4.22  3.71  0.195  0.231  0.339
    VideoLLaMA2 7B      | 4.17  4.02  4.47  3.93  0.253  0.266  0.344
    PLLaVA 7B           | 4.21  4.15  4.37  4.08  0.268  0.250  0.393
    ST-LLM 7B           | 4.00  3.98  4.31  3.94  0.213  0.238  0.321
    Tarsier 7B          | 3.59  3.50  4.07  3.41  0.143  0.185  0.415
    LLaVA-OneVision 7B  | 3.68  3.47  4.10  3.42  0.115  0.165  0.379
    Qwen2-VL-2B         | 4.01  3.98  4.37  3.88  0.202  0.221  0.406
    Qwen2-VL-7B         | 4.23  4.16  4.52  4.02  0.204  0.233  0.422
    Qwen2-VL-72B        | 4.28  4.14  4.55  4.08  0.241  0.314  0.449
    Claude3.5-Sonnet    | 4.13  4.01  4.49  4.05  0.243  0.228  0.442
    GPT-4o              | 4.22  3.97  4.48  3.90  0.264  0.213  0.432
    FaVChat             | 4.51  4.41  4.73  4.38  0.416  0.431  0.485
    """
)

# Table 3: UAR and WAR on DFEW, then on MAFW. FaVChat v2 is from the later version.
EMOTION = _table(
    """
    TMEP          | 57.16  68.85  37.17  51.15
    HiCMAE        | 63.76  75.01  42.65  56.17
    Emotion-LLaMA | 64.21  77.06      -      -
    MMA-DFER      | 66.01  77.51  44.11  58.52
    DFER-CLIP     | 59.61  71.25  38.89  52.55
    SVFAP         | 62.83  74.27  41.19  54.28
    MAE-DFER      | 63.41  74.43  41.62  54.31
    Finecliper    | 65.98  76.21  45.01  56.91
    Qwen2-VL-7B   | 43.08  52.83  31.67  45.89
    Qwen2-VL-72B  | 39.24  45.12  42.61  46.07
    FaVChat       | 68.17  77.88  49.07  60.97
    FaVChat v2    | 70.01  79.79  51.09  62.17
    """
)

# Table 4: EMER. An LLM judge's scores from 0 to 10.
EMER = _table(
    """
    Ground Truth    | 10.0  10.0
    VideoChat-Text  | 6.32  3.97
    Video-LLaMA     | 6.51  4.72
    Video-ChatGPT   | 6.98  5.79
    PandaGPT        | 7.15  5.49
    VideoChat-Embed | 7.15  5.65
    Valley          | 7.31  5.76
    FaVChat         | 8.09  6.71
    """
)

# Table 5: face verification, alone and given FaVChat's descriptions.
VERIFICATION = _table(
    """
    VideoChat 7B     | 54.74  73.61
    VideoChat2 7B    | 57.30  81.32
    VideoLLaMa2 7B   | 51.03  75.05
    Qwen2-VL-2B      | 46.46  65.39
    Qwen2-VL-7B      | 58.75  83.20
    Qwen2-VL-72B     | 64.83  84.51
    Claude3.5-Sonnet | 68.59  94.29
    GPT-4o           | 71.29  93.61
    FaVChat          | 82.38      -
    """
)

# Table 6: WAR on DFEW and MAFW of the model without one of its parts.
ABLATIONS = _table(
    """
    FaVChat | 77.88  60.97
    w/o FE  | 55.01  55.01
    w/o MG  | 70.04  57.49
    w/o MoE | 74.53  59.19
    """
)

# The later version's ablations, in the same unit.
ABLATIONS_V2 = _table(
    """
    FaVChat v2         | 79.79  62.17
    w/o facial encoder | 55.01  55.01
    w/o CA2            | 70.04  57.49
    w/o adapters       | 72.53  58.31
    """
)

# The later version's test on its own 2,000 samples, scored from 0 to 10 by an LLM judge.
HELD_OUT_QA = (("FaVChat v2", 8.89),)


def rows(table: Table, *figures: str, first: int = 0) -> list[dict[str, Any]]:
    """Names a table's columns after a result's figures; skips the first `first` columns, and rows without figures."""
    named = []
    for model, *numbers in table:
        known = {name: x for name, x in zip(figures, numbers[first:], strict=False) if x is not None}
        if known:
            named.append({"model": model, "figures": known})
    return named
