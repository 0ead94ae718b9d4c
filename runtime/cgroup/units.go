package cgroup

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
	"k8s.io/klog/v2"
)

// units is systemd, as far as this package talks to it.
type units interface {
	// start makes a transient scope, and returns when it is there. One of that name that is there already is as good.
	start(ctx context.Context, s scope) error
	// stop ends a unit and returns when it is over. One that is not there is none.
	stop(ctx context.Context, name string) error
	close() error
}

// scope is a transient scope of a pod.
type scope struct {
	name, slice, description string
	pid                      int // its first process
}

// property is one of StartTransientUnit's, of D-Bus type (sv).
type property struct {
	Name  string
	Value dbus.Variant
}

// properties of a pod's scope (systemd.scope(5), systemd.resource-control(5)).
func (s scope) properties() []property {
	p := func(name string, value any) property { return property{name, dbus.MakeVariant(value)} }
	return []property{
		p("Description", s.description),
		p("Slice", s.slice),
		p("PIDs", []uint32{uint32(s.pid)}),
		// All controllers are ours to hand out below, systemd writes nothing there, and one container that
		// runs out of memory does not end the others (OOMPolicy=continue follows from it).
		p("Delegate", true),
		// Else 15 % of the node's: a limit of all the pod's containers together that no one asked for.
		p("TasksMax", uint64(math.MaxUint64)),
		// No Conflicts=shutdown.target, as with runc and the kubelet's slices: pods are not stopped in the order of units, while
		// the kubelet's graceful shutdown is under way; what is left at the end is killed with everything else.
		p("DefaultDependencies", false),
		// However it ends, its name is free again.
		p("CollectMode", "inactive-or-failed"),
	}
}

const (
	managerName  = "org.freedesktop.systemd1"
	managerPath  = dbus.ObjectPath("/org/freedesktop/systemd1")
	managerIface = managerName + ".Manager"
	errNoUnit    = managerName + ".NoSuchUnit"
	errExists    = managerName + ".UnitExists"

	// privateSocket is where systemd listens to root without a message broker: nothing to be installed, one hop less, and a broker
	// that is restarted takes nothing with it. systemctl(1) of root uses it, too.
	privateSocket = "unix:path=/run/systemd/private"
)

// busPatience bounds how long systemd may be unreachable, as it is while it executes itself anew, and then each call of ours without a deadline.
// A daemon-reload of thousands of units takes seconds.
const busPatience = 25 * time.Second

// bus is systemd on D-Bus: one connection, opened again when it is lost. Calls are made, and jobs waited for, at the same time.
//
// go-systemd's dbus.Conn has two connections, ends them with the context that was around when they were made, and keeps all other
// calls waiting until one is answered.
type bus struct {
	dial func(ctx context.Context, signals dbus.SignalHandler) (*dbus.Conn, error)

	mu   sync.Mutex // also of who dials: others wait for its connection
	conn *dbus.Conn // guarded by mu; nil before the first and after close

	jobs jobs
}

// openBus connects, so that a daemon with a configuration that cannot work says so when it starts.
func openBus(ctx context.Context) (*bus, error) {
	b := &bus{dial: dialSystemd}
	ctx, cancel := context.WithTimeout(ctx, busPatience)
	defer cancel()
	if _, err := b.connect(ctx); err != nil {
		return nil, fmt.Errorf("cannot reach systemd: %w", err)
	}
	return b, nil
}

// dialSystemd connects to systemd itself, or where its socket is not to be had, through the system bus.
func dialSystemd(ctx context.Context, signals dbus.SignalHandler) (*dbus.Conn, error) {
	conn, direct := dialBus(ctx, privateSocket, signals)
	if direct == nil {
		return conn, nil
	}
	conn, err := dialBus(ctx, systemBus(), signals)
	if err == nil {
		if err = conn.Hello(); err == nil {
			err = conn.AddMatchSignalContext(ctx, dbus.WithMatchInterface(managerIface), dbus.WithMatchMember("JobRemoved"))
		}
		if err != nil {
			_ = conn.Close() // it is of no use
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w; %s: %w", privateSocket, direct, systemBus(), err)
	}
	return conn, nil
}

// systemBus is its address, as in the D-Bus specification's "Well-known Message Bus Instances".
func systemBus() string {
	if a := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); a != "" {
		return a
	}
	return "unix:path=/var/run/dbus/system_bus_socket"
}

func dialBus(ctx context.Context, address string, signals dbus.SignalHandler) (*dbus.Conn, error) {
	// The connection outlives ctx, but the handshake does not.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	conn, err := dbus.Dial(address, dbus.WithSignalHandler(signals), dbus.WithContext(life))
	if err != nil {
		end()
		return nil, err
	}
	stop := context.AfterFunc(ctx, end)
	err = conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))})
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		end()
		_ = conn.Close() // it is of no use
		return nil, err
	}
	return conn, nil // its own Close ends life's watcher
}

// connect returns the connection, a new one when it was lost. It tries for as long as ctx lasts.
func (b *bus) connect(ctx context.Context) (*dbus.Conn, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn != nil && b.conn.Connected() {
		return b.conn, nil
	}
	// Nothing tells when systemd listens again.
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		conn, err := b.dial(ctx, &b.jobs)
		if err == nil {
			b.conn = conn
			return conn, nil
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, err
		}
	}
}

func (b *bus) close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conn == nil {
		return nil
	}
	err := b.conn.Close()
	b.conn = nil
	return err
}

func (b *bus) start(ctx context.Context, s scope) error {
	return b.insist(ctx, s.name, func(ctx context.Context, conn *dbus.Conn) error {
		err := b.job(ctx, conn, s.name, "StartTransientUnit", s.name, "replace", s.properties(), []struct {
			Name       string
			Properties []property
		}{})
		if isBusError(err, errExists) {
			// It is ours, of a call whose answer was lost: joins its job, or does nothing when it is started.
			return b.job(ctx, conn, s.name, "StartUnit", s.name, "replace")
		}
		return err
	})
}

func (b *bus) stop(ctx context.Context, name string) error {
	return b.insist(ctx, name, func(ctx context.Context, conn *dbus.Conn) error {
		err := b.job(ctx, conn, name, "StopUnit", name, "replace")
		if isBusError(err, errNoUnit) {
			return nil
		}
		return err
	})
}

// insist runs a job until it has an answer: a connection that is lost on the way (daemon-reexec) leaves open whether it was
// done. Each is such that doing it twice is no harm.
func (b *bus) insist(ctx context.Context, unit string, run func(context.Context, *dbus.Conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, busPatience)
	defer cancel()
	for {
		conn, err := b.connect(ctx)
		if err != nil {
			return fmt.Errorf("cannot reach systemd: %w", err)
		}
		err = run(ctx, conn)
		if err == nil || conn.Connected() && !restarting(err) || ctx.Err() != nil {
			return err
		}
		klog.FromContext(ctx).V(2).Info("Lost the connection to systemd, trying again", "unit", unit, "err", err)
	}
}

// restarting reports whether the broker says that systemd has just left the bus.
func restarting(err error) bool {
	return isBusError(err, "org.freedesktop.DBus.Error.NoReply") || isBusError(err, "org.freedesktop.DBus.Error.ServiceUnknown") ||
		isBusError(err, "org.freedesktop.DBus.Error.NameHasNoOwner")
}

func isBusError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}

// job makes one of the manager's calls that return a job, and waits for its end.
func (b *bus) job(ctx context.Context, conn *dbus.Conn, unit, method string, args ...any) error {
	ended := b.jobs.expect(unit)
	defer b.jobs.forget(unit, ended)
	var job dbus.ObjectPath
	if err := conn.Object(managerName, managerPath).CallWithContext(ctx, managerIface+"."+method, 0, args...).Store(&job); err != nil {
		return err
	}
	for {
		select {
		case e := <-ended:
			if e.job != job { // a former one, that ours took the place of
				continue
			}
			if e.result != "done" {
				return fmt.Errorf("systemd's job ended: %s (see journalctl -u %s)", e.result, unit)
			}
			return nil
		case <-conn.Context().Done():
			return fmt.Errorf("%s: the connection was lost: %w", method, dbus.ErrClosed)
		case <-ctx.Done():
			return fmt.Errorf("%s: systemd's job does not end: %w", method, context.Cause(ctx))
		}
	}
}

// jobs hands the ends of jobs to who waits for them. It is the connection's SignalHandler: called by its reader, it must not wait.
type jobs struct {
	mu      sync.Mutex
	waiting map[string][]chan jobEnd // guarded by mu, by unit
}

type jobEnd struct {
	job    dbus.ObjectPath
	result string // "done", "canceled", "timeout", "failed", "dependency", "skipped"
}

// expect begins to listen, before the call that makes the job: its end may come before its name.
func (j *jobs) expect(unit string) chan jobEnd {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.waiting == nil {
		j.waiting = map[string][]chan jobEnd{}
	}
	c := make(chan jobEnd, 4) // ours, and former ones of that unit that it takes the place of
	j.waiting[unit] = append(j.waiting[unit], c)
	return c
}

func (j *jobs) forget(unit string, c chan jobEnd) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var left []chan jobEnd
	for _, w := range j.waiting[unit] {
		if w != c {
			left = append(left, w)
		}
	}
	if left == nil {
		delete(j.waiting, unit)
		return
	}
	j.waiting[unit] = left
}

// DeliverSignal takes JobRemoved(u id, o job, s unit, s result), and drops all else: on its private socket systemd tells everything.
func (j *jobs) DeliverSignal(iface, name string, s *dbus.Signal) {
	if iface != managerIface || name != "JobRemoved" || len(s.Body) < 4 {
		return
	}
	job, _ := s.Body[1].(dbus.ObjectPath)
	unit, _ := s.Body[2].(string)
	result, _ := s.Body[3].(string)
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, c := range j.waiting[unit] {
		select {
		case c <- jobEnd{job, result}:
		default: // full of former jobs' ends: the caller has its deadline
		}
	}
}
