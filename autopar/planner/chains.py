def layout_chains(problem, shape): raise NotImplementedError
