"""Plain, steered and guarded text from one prompt, and the page that shows what steering did. Needs no arguments."""

from pathlib import Path

from detox_guard import DecodingParams, DetoxiGen, GuardPolicy


def main() -> None:
    model = DetoxiGen.from_pretrained()  # the embedded default backbone and its detoxifier
    params = DecodingParams(max_new_tokens=40, seed=7)
    prompt = "So, I'm starting to think she's full of"

    plain = model.generate(prompt, params, alpha=0.0)
    steered = model.generate(prompt, params)
    guarded = model.generate(prompt, params, guard=GuardPolicy())
    print("plain:  ", plain.text)
    print("steered:", steered.text)
    print("guarded:", guarded.text)
    print(guarded.finish_reason, guarded.usage)

    if steered.trace:
        print(f"steered by {steered.trace.mean_kl_steering:.2f} nats a token")
        page = Path("out/quickstart.html")
        page.parent.mkdir(exist_ok=True)
        page.write_text(steered.trace.to_html(prompt=prompt), encoding="utf-8")
        print("open", page)


if __name__ == "__main__":
    main()
