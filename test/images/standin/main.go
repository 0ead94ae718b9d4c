// Command standin stands in for the programs that critest's images hold. It is
// one static binary, and what it does depends on the name it is called by:
//
//	nginx [PORT]  answers HTTP; its command line says "master process", as nginx's does; its pid is in /var/run/nginx.pid
//	httpd [PORT]  answers HTTP and says so on stderr
//	nnp           prints "Effective uid: N": whether its set-user-ID bit counted
//	pause         waits for a signal
//
// PORT is 80 if absent. SIGTERM, SIGINT and SIGQUIT end all of them with status 0.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	name, _, titled := strings.Cut(filepath.Base(os.Args[0]), ":")
	log.SetPrefix(name + ": ")
	var err error
	switch {
	case name == "nginx" && !titled:
		err = takeTitle("nginx: master process nginx")
	case name == "nginx":
		if err = os.WriteFile("/var/run/nginx.pid", []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err == nil {
			err = serve(func(*http.Request) {})
		}
	case name == "httpd":
		err = serve(func(r *http.Request) { log.Printf("%s %s %s", r.RemoteAddr, r.Method, r.URL.Path) })
	case name == "nnp":
		fmt.Printf("Effective uid: %d\n", os.Geteuid())
	case name == "pause":
		<-ended()
	default:
		err = fmt.Errorf("called by an unknown name")
	}
	if err != nil {
		log.Fatal(err)
	}
}

// takeTitle executes this program again with title as the first word of its command line.
func takeTitle(title string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	return syscall.Exec(exe, append([]string{title}, os.Args[1:]...), os.Environ())
}

// serve answers HTTP until a signal. It tells of each request.
func serve(tell func(*http.Request)) error {
	port := "80"
	if len(os.Args) > 1 {
		port = os.Args[1]
	}
	server := &http.Server{
		Addr:              ":" + port,
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			tell(r)
			fmt.Fprintln(w, "<h1>It works</h1>")
		}),
	}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }() // ends with the process
	log.Printf("serving port %s", port)
	select {
	case err := <-failed:
		return err
	case <-ended():
		return nil
	}
}

// ended gets a value at the first signal. A handler makes PID 1 receive them at all.
func ended() <-chan os.Signal {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	return c
}
