"""The job before the job: rehearsed on one CPU, priced on a hardware model, drawn."""
