// Goroutines, channels, garbage collection and preemption by signals; prints sums that do not depend on the order of things.
package main

import (
	"crypto/sha256"
	"fmt"
	"math/big"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync"
	"time"
)

// spin is preempted by a signal only: its loop calls nothing.
func spin(rounds uint64) uint64 {
	x := uint64(88172645463325252)
	for i := uint64(0); i < rounds; i++ {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
	}
	return x
}

func pipeline(count int) int {
	numbers, squares := make(chan int), make(chan int, 16)
	go func() {
		for i := 0; i < count; i++ {
			numbers <- i
		}
		close(numbers)
	}()
	var workers sync.WaitGroup
	for w := 0; w < 8; w++ {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for n := range numbers {
				squares <- n * n
			}
		}()
	}
	go func() { workers.Wait(); close(squares) }()
	sum := 0
	for s := range squares {
		sum += s
	}
	return sum
}

type tree struct{ left, right *tree }

func grow(depth int) *tree {
	if depth == 0 {
		return &tree{}
	}
	return &tree{grow(depth - 1), grow(depth - 1)}
}

func (t *tree) count() int {
	if t.left == nil {
		return 1
	}
	return 1 + t.left.count() + t.right.count()
}

func digests(count int) string {
	out := make([]string, count)
	var all sync.WaitGroup
	for i := range out {
		all.Add(1)
		go func(i int) {
			defer all.Done()
			out[i] = fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Repeat(fmt.Sprint(i), 500))))
		}(i)
	}
	all.Wait()
	sort.Strings(out)
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(out, ""))))
}

func recovered() (message string) {
	defer func() { message = fmt.Sprint(recover()) }()
	var nothing *tree
	return fmt.Sprint(nothing.left)
}

func main() {
	runtime.GOMAXPROCS(4)
	ticks := time.NewTicker(time.Millisecond)
	defer ticks.Stop()
	var spinners sync.WaitGroup
	for s := 0; s < 4; s++ {
		spinners.Add(1)
		go func() {
			defer spinners.Done()
			if spin(20_000_000) != spin(20_000_000) {
				fmt.Println("spin differs")
				os.Exit(1)
			}
		}()
	}
	fmt.Println("pipeline", pipeline(20000))
	live := 0
	for i := 0; i < 20; i++ {
		live += grow(12).count()
	}
	fmt.Println("trees", live)
	fmt.Println("digests", digests(500))
	fmt.Println("recovered", recovered())
	fmt.Println("factorial", sha256.Sum256([]byte(new(big.Int).MulRange(1, 2000).String())))
	spinners.Wait()
	fmt.Println("spin", spin(1000))
}
