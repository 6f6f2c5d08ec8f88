"""python -m gpt_kernels bench: what an op costs here, beside eager, torch.compile and peers, and how close it is to the limit.

| file            | what                                                                                     |
|-----------------|------------------------------------------------------------------------------------------|
| measure.py      | one row: right first, then time (warm, cold, first call), peak memory, share of the limit |
| ../cases/<op>.py | the cases of an op; attention.py also the sweep over sequence lengths                   |
| contention.py   | which samples other work on the machine disturbed                                        |
| models.py       | a GPT-2's training step and its token-by-token generation                                |
| peers.py        | other people's kernels, and why one is not there                                         |
| environment.py  | what the figures are valid for                                                           |
| settings.py     | what a user chooses: targets and flags                                                   |
| run.py          | the command: every target in a process of its own, one result                            |
| report.py, plots.py, report.html | table, CSV, plots, Markdown, HTML: all from the result's JSON          |
| result.py       | a result on disk, written and read                                                       |
| diff.py         | two results compared, noise told from change                                             |
"""
