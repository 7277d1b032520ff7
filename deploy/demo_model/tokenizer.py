"""The demo model's tokenizer: byte-level BPE of at most 1,280 ids on the generated text, with V4's special tokens at ids 0, 1, 2 and above.

python -m deploy.demo_model.tokenizer OUT_FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy.demo_model import chats, text

VOCAB_SIZE = 1280

SPECIAL = (
    text.BOS,
    text.EOS,
    "<｜▁pad▁｜>",
    chats.USER,
    chats.ASSISTANT,
    chats.THINK,
    chats.THINK_END,
    chats.DSML,
    "<｜latest_reminder｜>",
    "<｜System｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
)
NOT_SKIPPED = (chats.THINK, chats.THINK_END, chats.DSML)
"""Ordinary added tokens: they are part of the text that the output parser reads."""


def rendered() -> chats.Rendered:
    """What deepseek-recipe writes before the first user turn."""
    import deepseek_recipe as recipe

    def opening(**more: object) -> str:
        body = {"model": "demo", "messages": [{"role": "user", "content": "@"}], **more}
        options = recipe.ConversionOptions(default_thinking_mode="reasoning_effort" in more)
        options = options.with_model_versions_by_name({"demo": recipe.ModelVersion.DeepseekV4Pro})
        conversation = recipe.ChatCompletionRequest(body).convert(options).conversation
        return recipe.DeepseekV4Encoding().render_conversation(conversation).prompt.removeprefix(text.BOS).split(chats.USER)[0]

    tools = opening(tools=[{"type": "function", "function": chats.WEATHER_TOOL}])
    return chats.Rendered(tools, tuple(opening(reasoning_effort=effort) for effort in ("high", "max")))


def train(rendered: chats.Rendered) -> Tokenizer:
    rng = random.Random(1)
    lines = [text.story(rng, 8) for _ in range(2000)]
    for pieces in [text.records(rng, 300) for _ in range(500)] + [chats.chat(rng, rendered, 500) for _ in range(2000)]:
        lines.append("".join(piece.text for piece in pieces))
    for special in SPECIAL:
        lines = [line.replace(special, " ") for line in lines]
    lines += [" ".join(f"{pair:02d}" for pair in range(100))] * 2000
    tokenizer = Tokenizer(models.BPE())
    # Digits go in pairs, so that a code is two tokens: whole ones, by the line above.
    pairs = pre_tokenizers.Split(Regex(r"[0-9]{1,2}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pairs, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    openings = rendered()
    tokenizer = train(openings)
    saved = json.loads(tokenizer.to_str())
    for added in saved["added_tokens"]:
        added["special"] = added["content"] not in NOT_SKIPPED
    (folder / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False, separators=(",", ":")))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": text.BOS, "eos_token": text.EOS, "pad_token": SPECIAL[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    written = json.dumps(dataclasses.asdict(openings), indent=2) + "\n"  # the trainer needs no deepseek-recipe
    (pathlib.Path(__file__).parent / "rendered.json").write_text(written)
    print(f"{tokenizer.get_vocab_size()} ids")


if __name__ == "__main__":
    main()
