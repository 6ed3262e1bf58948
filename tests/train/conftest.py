from thrifty.train.process import prepare_process

# Tests that run beside others must not wait for each other's spinning threads.
prepare_process()
