package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// benchmarkParams are the sizes of critest's own benchmarks (its docs/benchmark.md):
// enough for a p99 of sorts, and done in a minute.
const benchmarkParams = `containersNumber: 100
containersNumberParallel: 1
containerBenchmarkTimeoutSeconds: 120
podsNumber: 100
podsNumberParallel: 1
podBenchmarkTimeoutSeconds: 120
imagesNumber: 50
imagesNumberParallel: 1
imageBenchmarkTimeoutSeconds: 120
podContainerStartBenchmarkTimeoutSeconds: 120
`

// benchmarkArgs makes critest run its benchmarks instead of its specs and write
// their results as JSON below o.out, in a directory that is emptied first.
func benchmarkArgs(o options) (args []string, results string, err error) {
	params := filepath.Join(o.fenced, "benchmark.yaml")
	results = filepath.Join(o.out, "critest-benchmark")
	if err := os.RemoveAll(results); err != nil {
		return nil, "", err
	}
	if err := os.MkdirAll(results, 0o755); err != nil {
		return nil, "", err
	}
	if err := os.WriteFile(params, []byte(benchmarkParams), 0o644); err != nil {
		return nil, "", err
	}
	return []string{"--benchmark", "--benchmarking-params-file", params, "--benchmarking-output-dir", results}, results, nil
}

// results is a file that a benchmark of critest writes (pkg/benchmark
// LifecycleBenchmarksResultsSet).
type results struct {
	OperationsNames []string `json:"operationsNames"`
	Datapoints      []struct {
		// Nanoseconds, in the order of the names.
		OperationsDurationsNs []time.Duration `json:"operationsDurationsNs"`
	} `json:"datapoints"`
}

// printResults prints a table of all results in dir, in Markdown.
func printResults(w io.Writer, dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return err
	}
	fmt.Fprintln(w, "| benchmark | operation | samples | p50 ms | p99 ms |\n|---|---|--:|--:|--:|")
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var r results
		if err := json.Unmarshal(data, &r); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for i, name := range r.OperationsNames {
			var took []time.Duration
			for _, d := range r.Datapoints {
				if i < len(d.OperationsDurationsNs) {
					took = append(took, d.OperationsDurationsNs[i])
				}
			}
			if len(took) == 0 {
				return fmt.Errorf("%s: no sample of %s", file, name)
			}
			slices.Sort(took)
			at := func(percent int) float64 { return float64(took[(len(took)-1)*percent/100]) / float64(time.Millisecond) }
			fmt.Fprintf(w, "| %s | %s | %d | %.2f | %.2f |\n", strings.TrimSuffix(filepath.Base(file), ".json"), name, len(took), at(50), at(99))
		}
	}
	return nil
}
