"""NV-Embed's tokenizer, built from Mistral's SentencePiece model: the same 32000 pieces and ids."""

from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors


def build(sentencepiece_model: Path) -> Tokenizer:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    tokenizer = Tokenizer(
        models.BPE(vocab, _merges(pieces, vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _merges(pieces, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others: best score first, then the order of the parts."""
    found = [
        (-pieces.get_score(index), index, vocab[piece[:cut]], vocab[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, index in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [split for *_, split in sorted(found)]
