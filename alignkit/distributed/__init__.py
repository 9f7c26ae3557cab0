"""Working in several processes: start them, gather their rows, and end them all when one fails.

`launcher` starts `alignkit --processes N` and lets a process leave its group cleanly, `gather`
collects log-probs from every process, and `errors` raises one process's error on all of them.
`worker_pool` asks processes that can be killed, behind the walls of `isolation` and `confinement`;
`deadline` limits the time of code in this one.
"""
