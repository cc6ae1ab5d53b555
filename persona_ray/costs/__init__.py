"""What a job will cost, before anything runs: tokens, GPU-hours, bytes, objects, requests, judge calls, money.

Nothing here looks at a cluster or at weights. Every number is either counted (rows, units, objects, requests), or follows by a
formula that stands in one place (`formulas`) from the model's size and a list of assumptions (`assumptions`), each with its
source and each to be replaced on the command line. Costs are those of the rollout stage and the judge: loading the model, waiting,
work that was lost and done again, the reduction and the steering check are not counted.
"""
