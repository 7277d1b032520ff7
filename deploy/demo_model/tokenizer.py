"""The demo model's tokenizer: byte-level BPE of at most 1,024 ids on the generated text, with V4's special tokens at ids 0, 1, 2 and above.

python -m deploy.demo_model.tokenizer OUT_FOLDER
"""

from __future__ import annotations

import json
import pathlib
import random
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.demo_model import text

VOCAB_SIZE = 1024

SPECIAL = (
    text.BOS,
    text.EOS,
    "<｜▁pad▁｜>",
    text.USER,
    text.ASSISTANT,
    "<think>",
    text.THINK_END,
    text.DSML,
    "<｜latest_reminder｜>",
    "<｜System｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
NOT_SKIPPED = ("<think>", text.THINK_END, text.DSML)
"""Ordinary added tokens: they are part of the text that the output parser reads."""


def rendered_tools() -> str:
    """The tools section as deepseek-recipe renders it before the first user turn."""
    import deepseek_recipe as recipe

    declared = json.loads(text.WEATHER_TOOL)
    body = {"model": "demo", "messages": [{"role": "user", "content": "@"}], "tools": [{"type": "function", "function": declared}]}
    options = recipe.ConversionOptions(default_thinking_mode=False)
    options = options.with_model_versions_by_name({"demo": recipe.ModelVersion.DeepseekV4Pro})
    conversation = recipe.ChatCompletionRequest(body).convert(options).conversation
    prompt = recipe.DeepseekV4Encoding().render_conversation(conversation).prompt
    return prompt.removeprefix(text.BOS).split(text.USER)[0]


def train() -> Tokenizer:
    rng = random.Random(1)
    lines = [text.story(rng, 8) for _ in range(2000)]
    lines += [text.record_document(rng, 8, 1.0, 3) for _ in range(1000)]
    tools = rendered_tools()
    plain = [text.chat(rng, tools) for _ in range(2000)]
    for special in SPECIAL:
        plain = [line.replace(special, " ") for line in plain]
    tokenizer = Tokenizer(models.BPE())
    # Digits stand alone, so that a code is four tokens and arithmetic sees its digits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines + plain, trainer)
    return tokenizer


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    saved = json.loads(tokenizer.to_str())
    for added in saved["added_tokens"]:
        added["special"] = added["content"] not in NOT_SKIPPED
    (folder / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False, separators=(",", ":")))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text.BOS, "eos_token": text.EOS, "pad_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (pathlib.Path(__file__).parent / "rendered_tools.txt").write_text(rendered_tools())  # the trainer needs no deepseek-recipe
    print(f"{tokenizer.get_vocab_size()} ids")


if __name__ == "__main__":
    main()
