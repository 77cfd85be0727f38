"""The small BLIP, pictures and prompts that T2I-CompBench's own code was run on; docs/t2i_compbench.md says how."""

import numpy as np
import torch
from PIL import Image

from original_janus import weight

SIDE = 64
"""Of the small twin's pictures, instead of 480 pixels."""
SIZES = [(64, 64), (80, 50), (40, 96), (33, 64), (64, 64)]
IMAGES = [
    Image.fromarray(np.random.RandomState(300 + i).randint(0, 256, (height, width, 3)).astype(np.uint8))
    for i, (width, height) in enumerate(SIZES)
]
PHRASES = {
    "a red cat and a blue dog": ["a red cat", "a blue dog"],
    "The red Hat was on top of the coat rack.": ["The red Hat", "top", "the coat rack"],
    "a dog! on the left": ["a dog!", "the left"],
    "many things": [
        "thing one",
        *(f"{word} thing" for word in ("red", "blue", "a", "the", "dog", "cat", "hat", "coat", "x9")),
    ],
    "run": [],
}
"""Noun phrases that a stand-in for spaCy gives for each prompt, the places among them too."""
PROMPTS = list(PHRASES)
WORDS = ["a", "the", "red", "blue", "cat", "dog", "hat", "coat", "?", ","]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 48,
    "add_cross_attention": True,
}


def vocabulary():
    """As many tokens as BERT's, those that the original names by number where it looks for them."""
    tokens = [f"[unused{i}]" for i in range(30522)]
    for index, token in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}.items():
        tokens[index] = token
    tokens[2748], tokens[2053] = "yes", "no"
    for index, token in enumerate([*WORDS, *LETTERS[1:], *(f"##{letter}" for letter in LETTERS)]):
        tokens[3000 + index] = token
    return tokens


def made(shapes):
    """Tensors under the original's names, the same wherever they are made."""
    state = {}
    for name, shape in shapes.items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[-1])[None]
        elif name.startswith("text_decoder.cls.predictions.decoder."):
            continue  # the same tensor as another one
        else:
            state[name] = weight(name, shape) + float(name.endswith("LayerNorm.weight"))
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    state[words] *= 0.1  # so that answers are neither 0 nor 1
    state["text_decoder.cls.predictions.decoder.weight"] = state[words]
    state["text_decoder.cls.predictions.decoder.bias"] = state["text_decoder.cls.predictions.bias"]
    return {name: state[name] for name in shapes}
