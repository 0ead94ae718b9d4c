package podsandbox

import "fmt"

// podPhase is where a pod is in its life.
//
//	           commit            stop              stopped            remove              gone
//	making ───────────▶ ready ────────▶ stopping ─────────▶ stopped ─────────▶ removing ───────▶ gone
//	  │                   │                ▲
//	  │ fail              │ die            │ stop
//	  ▼        gone       ▼                │
//	undoing ────────▶   dead ──────────────┘
//	          (gone)
//
// CRI sees ready as READY, dead to removing as NOTREADY, and nothing of the others.
type podPhase string

const (
	podMaking   podPhase = "making"   // recorded, not committed
	podUndoing  podPhase = "undoing"  // the making failed and is being unmade; retried until it is
	podReady    podPhase = "ready"    // committed, its init lives
	podDead     podPhase = "dead"     // its init is gone, or out of reach; not stopped yet
	podStopping podPhase = "stopping" // takes no new containers; what runs is being ended
	podStopped  podPhase = "stopped"  // nothing of it is left in the kernel
	podRemoving podPhase = "removing" // being deleted from disk
	podGone     podPhase = "gone"     // nothing is left
)

// podEvent is what happens to a pod.
type podEvent string

const (
	podCommit  podEvent = "commit"  // everything is made and recorded
	podFail    podEvent = "fail"    // a step of the making failed
	podDie     podEvent = "die"     // the init died, or the node was rebooted
	podStop    podEvent = "stop"    // StopPod
	podIsDown  podEvent = "stopped" // all is undone but the files
	podRemove  podEvent = "remove"  // RemovePod
	podIsGone  podEvent = "gone"    // the files are deleted, too
	podRefused          = podPhase("")
)

// podTable is total: what is not in a row is refused with ErrState.
var podTable = map[podPhase]map[podEvent]podPhase{
	podMaking:   {podCommit: podReady, podFail: podUndoing},
	podUndoing:  {podFail: podUndoing, podIsGone: podGone},
	podReady:    {podDie: podDead, podStop: podStopping},
	podDead:     {podDie: podDead, podStop: podStopping},
	podStopping: {podDie: podStopping, podStop: podStopping, podIsDown: podStopped},
	podStopped:  {podDie: podStopped, podStop: podStopped, podIsDown: podStopped, podRemove: podRemoving},
	podRemoving: {podDie: podRemoving, podStop: podRemoving, podIsDown: podRemoving, podRemove: podRemoving, podIsGone: podGone},
	podGone:     {podDie: podGone, podStop: podGone, podRemove: podGone, podIsGone: podGone},
}

// next is the phase after an event, or ErrState.
func (p podPhase) next(e podEvent) (podPhase, error) {
	if n := podTable[p][e]; n != podRefused {
		return n, nil
	}
	return p, fmt.Errorf("%w: the pod is %s", ErrState, p)
}

// shown says whether CRI sees the pod.
func (p podPhase) shown() bool {
	switch p {
	case podReady, podDead, podStopping, podStopped, podRemoving:
		return true
	}
	return false
}

// containerPhase is where a container is in its life.
//
//	           commit            started          exit              remove              gone
//	making ───────────▶ created ────────▶ running ───────▶ exited ─────────▶ removing ───────▶ gone
//	  │                   │                                   ▲
//	  │ fail              │ exit: the start failed, or        │
//	  ▼        gone       │ it was stopped before it          │
//	undoing ────────▶     └───────────────────────────────────┘
//	          (gone)
type containerPhase string

const (
	containerMaking   containerPhase = "making"
	containerUndoing  containerPhase = "undoing"
	containerCreated  containerPhase = "created"
	containerRunning  containerPhase = "running"
	containerExited   containerPhase = "exited"
	containerRemoving containerPhase = "removing" // exited, being deleted
	containerGone     containerPhase = "gone"
)

// containerEvent is what happens to a container.
type containerEvent string

const (
	containerCommit  containerEvent = "commit"
	containerFail    containerEvent = "fail"
	containerStarted containerEvent = "started" // its program runs
	containerExit    containerEvent = "exit"    // it ended, or never will begin
	containerRemove  containerEvent = "remove"
	containerIsGone  containerEvent = "gone"

	containerRefused = containerPhase("")
)

// containerTable is total, as podTable.
var containerTable = map[containerPhase]map[containerEvent]containerPhase{
	containerMaking:   {containerCommit: containerCreated, containerFail: containerUndoing},
	containerUndoing:  {containerFail: containerUndoing, containerIsGone: containerGone},
	containerCreated:  {containerStarted: containerRunning, containerExit: containerExited, containerRemove: containerRemoving},
	containerRunning:  {containerExit: containerExited},
	containerExited:   {containerExit: containerExited, containerRemove: containerRemoving},
	containerRemoving: {containerExit: containerRemoving, containerRemove: containerRemoving, containerIsGone: containerGone},
	containerGone:     {containerExit: containerGone, containerRemove: containerGone, containerIsGone: containerGone},
}

// next is the phase after an event, or ErrState.
func (p containerPhase) next(e containerEvent) (containerPhase, error) {
	if n := containerTable[p][e]; n != containerRefused {
		return n, nil
	}
	return p, fmt.Errorf("%w: the container is %s", ErrState, p)
}

// shown is the state that CRI sees; "" is none.
func (p containerPhase) shown() ContainerState {
	switch p {
	case containerCreated:
		return ContainerCreated
	case containerRunning:
		return ContainerRunning
	case containerExited, containerRemoving:
		return ContainerExited
	}
	return ""
}
