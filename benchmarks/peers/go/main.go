// A NATS peer of natsync's benchmark, on nats.go; benchmarks/README.md states its command line.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

var end = []byte("__STREAM_END__")

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func ready(nc *nats.Conn) {
	check(nc.Flush())
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

func serve(nc *nats.Conn, subject string, n, size int) {
	chunks := make([][]byte, n)
	for i := range chunks {
		c := []byte(fmt.Sprintf("%d ", i))
		for len(c) < size {
			c = append(c, 'x')
		}
		chunks[i] = c[:size]
	}
	_, err := nc.Subscribe(subject, func(m *nats.Msg) {
		go func() {
			for _, c := range chunks {
				nc.Publish(m.Reply, c)
			}
			nc.Publish(m.Reply, end)
		}()
	})
	check(err)
	ready(nc)
}

func echo(nc *nats.Conn, subject string) {
	_, err := nc.Subscribe(subject, func(m *nats.Msg) { m.Respond(m.Data) })
	check(err)
	ready(nc)
}

type result struct {
	Chunks int    `json:"chunks"`
	Wrong  int    `json:"wrong"`
	Ended  string `json:"ended"`
}

func one(nc *nats.Conn, subject string) (chunks [][]byte, ended string, first time.Time) {
	inbox := nats.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	check(err)
	sub.SetPendingLimits(-1, -1)
	check(nc.PublishRequest(subject, inbox, nil))
	for {
		m, err := sub.NextMsg(10 * time.Second)
		if err != nil {
			return chunks, err.Error(), first
		}
		if first.IsZero() {
			first = time.Now()
		}
		if bytes.Equal(m.Data, end) {
			break
		}
		chunks = append(chunks, m.Data)
	}
	sub.Unsubscribe()
	return chunks, "end", first
}

func stream(nc *nats.Conn, subject string, k int) {
	all := make([][][]byte, k)
	results := make([]result, k)
	var wg sync.WaitGroup
	start := time.Now()
	for i := 0; i < k; i++ {
		wg.Add(1)
		go func(i int) {
			defer wg.Done()
			all[i], results[i].Ended, _ = one(nc, subject)
		}(i)
	}
	wg.Wait()
	seconds := time.Since(start).Seconds()
	for i, chunks := range all {
		results[i].Chunks = len(chunks)
		for place, c := range chunks {
			if !bytes.HasPrefix(c, []byte(fmt.Sprintf("%d ", place))) {
				results[i].Wrong++
			}
		}
	}
	print(map[string]any{"seconds": seconds, "streams": results})
}

func first(nc *nats.Conn, subject string, n int) {
	times := make([]float64, n)
	for i := range times {
		before := time.Now()
		chunks, ended, at := one(nc, subject)
		if ended != "end" || len(chunks) == 0 {
			check(fmt.Errorf("stream %d: %d chunks, %s", i, len(chunks), ended))
		}
		times[i] = float64(at.Sub(before).Nanoseconds()) / 1e3
	}
	sort.Float64s(times)
	print(map[string]any{"p50_us": times[n/2]})
}

func print(v any) {
	b, err := json.Marshal(v)
	check(err)
	fmt.Println(string(b))
}

func request(nc *nats.Conn, subject string, n, threads, size int) {
	payload := bytes.Repeat([]byte("x"), size)
	for i := 0; i < 100; i++ {
		_, err := nc.Request(subject, payload, 2*time.Second)
		check(err)
	}
	times := make([][]float64, threads)
	var wg sync.WaitGroup
	start := time.Now()
	for t := 0; t < threads; t++ {
		wg.Add(1)
		go func(t int) {
			defer wg.Done()
			for i := 0; i < n/threads; i++ {
				before := time.Now()
				if _, err := nc.Request(subject, payload, 2*time.Second); err != nil {
					return
				}
				times[t] = append(times[t], float64(time.Since(before).Nanoseconds())/1e3)
			}
		}(t)
	}
	wg.Wait()
	seconds := time.Since(start).Seconds()
	var done []float64
	for _, t := range times {
		done = append(done, t...)
	}
	sort.Float64s(done)
	print(map[string]any{"seconds": seconds, "done": len(done), "failed": n/threads*threads - len(done),
		"p50_us": done[len(done)/2], "p99_us": done[len(done)*99/100]})
}

func main() {
	nc, err := nats.Connect(os.Getenv("NATS_URL"))
	check(err)
	defer nc.Close()
	args, options := []string{}, map[string]int{"streams": 1, "threads": 1, "size": 128}
	for i := 1; i < len(os.Args); i++ {
		if a := os.Args[i]; a[0] == '-' {
			options[a[1:]], err = strconv.Atoi(os.Args[i+1])
			check(err)
			i++
		} else {
			args = append(args, a)
		}
	}
	number := func(i int) int {
		n, err := strconv.Atoi(args[i])
		check(err)
		return n
	}
	switch args[0] {
	case "serve":
		serve(nc, args[1], number(2), number(3))
	case "echo":
		echo(nc, args[1])
	case "stream":
		stream(nc, args[1], options["streams"])
	case "request":
		request(nc, args[1], number(2), options["threads"], options["size"])
	case "first":
		first(nc, args[1], number(2))
	case "publish":
		payload := bytes.Repeat([]byte("x"), number(3))
		start := time.Now()
		for i := 0; i < number(2); i++ {
			check(nc.Publish(args[1], payload))
		}
		check(nc.Flush())
		print(map[string]any{"seconds": time.Since(start).Seconds(), "done": number(2)})
	}
}
