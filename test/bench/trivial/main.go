// Command trivial does nothing: true(1) for the benchmark's exec. The payload would be most of what is measured: it
// takes a Go program of its size longer to start than crispd takes to start it.
package main

func main() {}
