"""Gists without any framework: compress, look at the prompt, answer, compare with text.

python examples/plain_hf.py --model smollm2-135m-rag     # or a folder, or a Hugging Face id
"""

import argparse

from gist_rag import GistEngine, Passage, Sampling
from gist_rag.models import DEFAULT_RAG_MODEL
from gist_rag.prompt import Known, rag_messages

PASSAGES = [
    Passage(
        "The Kestrel turbine was designed in Aarhus in 1987. Its rotor is 34 metres wide and its "
        "tower is built of laminated spruce, which was thought to be a mistake at the time. The "
        "first one stood beside the harbour, where it ran for twenty-six years."
    ),
    Passage(
        "Beekeeping is allowed on the roofs of the old town. Each hive needs a number plate and a "
        "neighbour's consent, and the honey may be sold at the Saturday market. In dry summers the "
        "city fills shallow basins with water, so that the bees keep away from the fountains."
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_RAG_MODEL)
    parser.add_argument("--ratio", type=float, default=4)
    options = parser.parse_args()

    with GistEngine.from_pretrained(options.model, settings={"ratio": options.ratio}) as engine:
        done = engine.precompute(PASSAGES)
        print(f"{done.tokens} tokens compressed in {done.seconds:.1f} s, {done.num_bytes:,} bytes")

        # The prompt is ordinary text. What the engine knows in it, it reads as gists.
        messages = rag_messages("How wide is the rotor?", [p.text for p in PASSAGES])
        for segment in engine.segments(messages):
            kind = "gist" if isinstance(segment, Known) else "text"
            print(f"  {kind}: {segment.text[:60]!r}")

        for mode in ("require", "off"):  # warm up
            engine.generate(messages, Sampling(max_tokens=1), gist_mode=mode)
        short = Sampling(max_tokens=24)
        gist = engine.generate(messages, short, gist_mode="require")
        text = engine.generate(messages, short, gist_mode="off")
        for name, answer in (("gists", gist), ("text", text)):
            print(f"from {name}: {answer.text.strip()!r}, {answer.stats.first_token_ms:.0f} ms")
        print(f"{gist.stats.source_tokens} tokens were read as {gist.stats.gist_slots:.0f} slots")


if __name__ == "__main__":
    main()
