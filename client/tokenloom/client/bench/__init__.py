"""`tokenloom bench`: loads a server from several processes and reports what its clients saw.

cli.py        the command line
workload.py   which requests: prompts, lengths, named cases
load.py       when: all at once, a fixed concurrency, Poisson arrivals; and where to
measure.py    the parent: starts the processes, gathers their records
process.py    a process: sends its share, notes when each delta came
openai.py     calls of an OpenAI-compatible server; `process.py` has tokenloom's own
figures.py    from records to percentiles, goodput, stalls
report.py     the tables, the JSON; plot.py the picture
"""
