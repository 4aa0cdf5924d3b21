"""The hub's text benchmarks, asked of a run as it is: a model class for lm-evaluation-harness.

Helper of eval_text.py, whose figures these are (pip install -e '.[lm-eval]'; it downloads its tasks):
  python lm_eval_model.py out/mine --tasks=arc_easy,openbookqa --limit=100
  python lm_eval_model.py out/mine --tasks=mmlu --num_fewshot=5
  python lm_eval_model.py out/mine --tasks=mine --include_path=folder      mine.yaml there says what is asked
A text is read as in training, from its own first token on and with no begin token, and as a whole: we cut
no long context. After `import lm_eval_model` the class is lm_eval's model "nanoopuslm" with the argument run.
"""
import argparse

from decode import steps
from eval_text import join, predictions, windows
from interleave import TEXT, text_frames
from script import run_script
from speaker import Speaker

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:             # main says so
    lm_eval, LM, register_model = None, object, lambda name: lambda kind: kind

MAX_TOKENS = 256        # of an answer, where the task does not say


@register_model("nanoopuslm")
class NanoOpusLM(LM):
    """A run's answers to lm_eval's three kinds of requests, whose .args are what is asked."""

    def __init__(self, run, dtype="auto", **_):
        """run: folder, as of speaker.Speaker. lm_eval also tells a batch size and a device: not needed."""
        super().__init__()
        speaker = Speaker(run, dtype=dtype)
        self.model, self.vocab, self.text_tokenizer = speaker.model, speaker.vocab, speaker.text_tokenizer

    def read(self, parts):
        """[[(ids, n)]] -> for each list of documents (log probability in nats, is all of it greedy)."""
        found = iter(predictions(self.model, self.vocab, [document for part in parts for document in part]))
        read = [[next(found) for _ in part] for part in parts]
        return [(float(sum(scores.sum() for scores, _ in part)), all(bool(best.all()) for _, best in part))
                for part in read]

    def loglikelihood(self, requests):
        """[(context, continuation)] -> [(log probability of that, would greedy decoding give it)]."""
        asked = [join(self.text_tokenizer, *request.args) for request in requests]
        return self.read([[(ids, n)] if n else [] for ids, n in asked])

    def loglikelihood_rolling(self, requests):
        """[(text,)] -> [log probability of each], but for its first token."""
        found = self.read([windows(self.text_tokenizer.encode(text)) for text, in (r.args for r in requests)])
        return [total for total, _ in found]

    def generate_until(self, requests):
        """[(context, {"until": where to stop, "max_gen_toks"})] -> [what greedy decoding says before]."""
        return [self.go_on(*request.args) for request in requests]

    def go_on(self, context, options):
        if options.get("do_sample"):
            raise ValueError("the task wants sampled answers (do_sample): we give the likeliest ones only")
        until, tokenizer, text = options.get("until") or [], self.text_tokenizer, ""
        until = [until] if isinstance(until, str) else until
        ids = tokenizer.encode(context)
        before = len(tokenizer.decode(ids))         # both decoded whole: else sentencepiece drops a space
        prefix, limit = text_frames(self.vocab, ids), options.get("max_gen_toks", MAX_TOKENS)
        for frames, known, eos in steps(self.model, self.vocab, [prefix], TEXT, limit, min_frames=0):
            new = frames[0, known[0]:eos[0], 0]
            new = new[new >= self.vocab.text_start]                         # the rest is not decoded yet
            text = tokenizer.decode(ids + (new - self.vocab.text_start).tolist())[before:]
            ends = [text.index(stop) for stop in until if stop and stop in text]
            if ends:
                return text[:min(ends)]
        return text


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--tasks", required=True, help="names of lm_eval's tasks, with commas between")
    parser.add_argument("--limit", type=int, help="questions of each task (default: all)")
    parser.add_argument("--num_fewshot", type=int, help="answered examples before each (default: the task's)")
    parser.add_argument("--include_path", help="a folder with tasks of your own")
    args = parser.parse_args(arguments)
    if lm_eval is None:
        print("lm_eval: not available: pip install -e '.[lm-eval]'")
        return 3
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
    found = lm_eval.simple_evaluate(NanoOpusLM(args.run), tasks=args.tasks.split(","), limit=args.limit,
                                    num_fewshot=args.num_fewshot,
                                    task_manager=TaskManager(include_path=args.include_path))
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    return 0


if __name__ == "__main__":
    run_script(main)
