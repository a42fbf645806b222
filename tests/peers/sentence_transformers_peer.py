"""What sentence-transformers makes of texts and of pairs, by its own code.

Reads from stdin a list of jobs {folder, texts, prompt_name?} or {folder, pairs}; writes a list of their results."""

import json
import sys


def main():
    from sentence_transformers import CrossEncoder, SentenceTransformer
    results = []
    for job in json.load(sys.stdin):
        try:
            if "pairs" in job:
                model = CrossEncoder(job["folder"], device="cpu")
                results.append([float(score) for score in model.predict([tuple(pair) for pair in job["pairs"]])])
            else:
                model = SentenceTransformer(job["folder"], device="cpu")
                more = {"prompt_name": job["prompt_name"]} if job.get("prompt_name") else {}
                results.append(model.encode(job["texts"], normalize_embeddings=True, batch_size=1, **more).tolist())
        except Exception as error:      # this version cannot load it
            results.append(f"{type(error).__name__}: {error}"[:400])
    sys.stdout.write("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
