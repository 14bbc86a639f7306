"""Holds the models: Flax Linen modules, one file per published part, and FaVChat's two variants in `favchat.py`.

A letter stands for the same dimension in every shape of `models/` and `generation/`, and the tests check the shapes
(jaxtyping's import hook with beartype):

| letter | dimension |
|---|---|
| B | clips of a batch |
| Q | questions about a clip, or responses to a question |
| R | sequences of the language model: B * Q |
| T | frames of a clip |
| H, W | rows and columns of a frame, in pixels, patches or tokens; h, w after downsampling |
| L | tokens of a sequence; in attention, the queries |
| S | tokens that are read: visual tokens of a clip, keys and values, slots of a cache |
| N | visual tokens of a question |
| P | word pieces of a question, as the Q-Formers read it |
| D | channels of a token |
| E, F | channels of a layer's second input, and of its output |
| A, K | heads of an attention, and of its keys and values |
| C | channels of a head, or of a frame: 3, or 6 with the face behind the whole picture |
| V | words of the vocabulary |
| r | rank of a low-rank adapter |

A letter after an underscore differs from item to item of a list (`_S`), `#B` may be 1, `...` is any number of
dimensions.

`convert/pytorch/` holds the same equations for exports; a change here needs the same change there.
"""
