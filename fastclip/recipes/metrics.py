"""How close generated sentences are to what people wrote: BLEU, ROUGE-L and NIST, each by an existing library.

All three are in percent but NIST, which has no upper bound. The published figures come from the challenge's own scripts,
whose tokenisation is another: differences of a point are in the measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def generation_metrics(sentences: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """{"BLEU", "ROUGE-L", "NIST"} of one sentence for each list of references. ValueError if a library is missing.

    BLEU: sacrebleu over the corpus, all references of a sentence, its tokenisation 13a. ROUGE-L: rouge-score's F-measure
    against the best reference, the mean over sentences. NIST: nltk's, n-grams up to 5, on 13a's tokens in lower case.
    """
    sacrebleu, rouge, nist = _libraries()
    most = max(map(len, references))
    # One stream for each place in the lists; sacrebleu leaves out what is None.
    streams = [[of[i] if i < len(of) else None for of in references] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(list(sentences), streams).score
    scorer = rouge.RougeScorer(["rougeL"])
    overlap = [
        scorer.score_multi(list(of), sentence)["rougeL"].fmeasure
        for sentence, of in zip(sentences, references, strict=True)
    ]
    split = sacrebleu.tokenizers.tokenizer_13a.Tokenizer13a()

    def words(sentence: str) -> list[str]:
        return split(sentence.lower()).split()

    try:
        informed = nist.corpus_nist([[words(each) for each in of] for of in references], list(map(words, sentences)))
    except ZeroDivisionError:  # nothing generated, or no n-gram of a length in common with any reference
        informed = 0.0
    return {"BLEU": bleu, "ROUGE-L": 100 * sum(overlap) / len(overlap), "NIST": float(informed)}


def _libraries() -> tuple[Any, Any, Any]:
    try:
        import sacrebleu
        import sacrebleu.tokenizers.tokenizer_13a
        from nltk.translate import nist_score  # type: ignore[import-untyped]
        from rouge_score import rouge_scorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(
            f"generated text is measured by sacrebleu, rouge-score and nltk ({error}): pip install sacrebleu rouge-score nltk"
        ) from error
    return sacrebleu, rouge_scorer, nist_score
