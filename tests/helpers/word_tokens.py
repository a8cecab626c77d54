"""A data set of random words, and how its examples become a batch."""

import torch


class WordTokens(torch.utils.data.Dataset):
    """Sources and targets of ragged lengths."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict:
        generator = torch.Generator().manual_seed(i)
        return {
            "input_ids": torch.randint(3, 64, (7 + 3 * i,), generator=generator).tolist(),
            "labels": torch.randint(3, 64, (4 + i,), generator=generator).tolist(),
        }


def pad(features: list[dict]) -> dict:
    """What DataCollatorForSeq2Seq makes, without a tokenizer."""
    batch = {}
    for key, filler in (("input_ids", 0), ("labels", -100)):
        rows = [torch.tensor(f[key]) for f in features]
        batch[key] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch
