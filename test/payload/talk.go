package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

func init() {
	verbs["http"] = verb{"ADDRESS (serves: /hostname, /id; anything else says hello)", serveHTTP}
	verbs["get"] = verb{"URL (retries until the server listens, 5 s at most)", get}
	verbs["listen"] = verb{"NETWORK ADDRESS (tcp…: echoes; udp…: echoes packets)", listen}
	verbs["dial"] = verb{"NETWORK ADDRESS TEXT (prints the answer)", dial}
	verbs["addr"] = verb{"(links and addresses)", func([]string) error {
		links, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, l := range links {
			addrs, err := l.Addrs()
			if err != nil {
				return err
			}
			fmt.Println(l.Name, l.Flags, l.MTU, strings.Trim(fmt.Sprint(addrs), "[]"))
		}
		return nil
	}}
}

func serveHTTP(args []string) error {
	if err := want(args, 1, 1); err != nil {
		return err
	}
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/hostname", func(w http.ResponseWriter, _ *http.Request) {
		name, _ := os.Hostname() // an empty answer shows as well
		fmt.Fprintln(w, name)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello from pid %d on %s to %s\n", os.Getpid(), l.Addr(), r.RemoteAddr)
	})
	fmt.Println("listening on", l.Addr())
	return (&http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}).Serve(l)
}

func get(args []string) error {
	if err := want(args, 1, 1); err != nil {
		return err
	}
	client := &http.Client{Timeout: 5 * time.Second}
	var err error
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var resp *http.Response
		if resp, err = client.Get(args[0]); err != nil {
			continue
		}
		defer resp.Body.Close()
		_, err = io.Copy(os.Stdout, resp.Body)
		return err
	}
	return err
}

func listen(args []string) error {
	if err := want(args, 2, 2); err != nil {
		return err
	}
	if strings.HasPrefix(args[0], "udp") {
		c, err := net.ListenPacket(args[0], args[1])
		if err != nil {
			return err
		}
		fmt.Println("listening on", c.LocalAddr())
		buf := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return err
			}
			if _, err := c.WriteTo(buf[:n], from); err != nil {
				return err
			}
		}
	}
	l, err := net.Listen(args[0], args[1])
	if err != nil {
		return err
	}
	fmt.Println("listening on", l.Addr())
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { // ends with its connection
			defer c.Close()
			_, _ = io.Copy(c, c) // the peer sees what is missing
		}()
	}
}

func dial(args []string) error {
	if err := want(args, 3, 3); err != nil {
		return err
	}
	c, err := net.DialTimeout(args[0], args[1], 3*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte(args[2])); err != nil {
		return err
	}
	buf := make([]byte, 64<<10)
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	fmt.Println(string(buf[:n]))
	return nil
}
