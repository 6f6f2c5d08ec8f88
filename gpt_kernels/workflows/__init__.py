"""From text to a trained model, in functions to copy from: plain arguments, no settings of ours.

| file        | what                                                                                        |
|-------------|---------------------------------------------------------------------------------------------|
| text.py     | text of this machine or of the user, a part held out; a BPE tokenizer; tokens              |
| models.py   | a GPT-2 of Hugging Face with fresh weights; the loss of a model, theirs or ours             |
| train.py    | batches, the optimizer and its schedule, the loop, its progress                             |
| evaluate.py | loss and perplexity on text that was held out                                               |
| generate.py | a continuation of a prompt, and how fast                                                    |

With transformers and tokenizers, `pip install 'gpt-kernels[demo]'`. The commands' arguments are in commands/.
"""
