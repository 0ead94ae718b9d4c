// Package initproto is the one protocol of crisp's processes: daemon ↔ pod
// init, and pod init ↔ the init of a container or of an exec'd process.
//
// A connection is a SOCK_SEQPACKET unix socket ([Conn]). A [Message] has a type,
// a request number, a body and file descriptors; replies carry the number of
// their request. Bodies and descriptors of any size travel: a message is cut into
// frames that fit the socket's and the kernel's limits (SCM_MAX_FD).
//
// # Conversation
//
//	crispd                         crisp-init pod                  crisp-init container | exec
//	  │ clone+exec ──────────────────▶│
//	  │ Setup ───────────────────────▶│  cgroups, lo, hostname, sysctls, /dev/shm, reaper
//	  │◀─────────────────────── Ready │
//	  │ Create (mount fds …) ────────▶│  holds them
//	  │◀─────────────────────── Done  │
//	  │ Start ───────────────────────▶│ clone+exec ──────────────────▶│
//	  │                               │ Run (the same fds) ──────────▶│  mounts, user, caps, seccomp
//	  │                               │◀─────────────── Console (tty) │
//	  │                               │◀── Failed{step, errno} or EOF │  EOF after Done: execve succeeded
//	  │                               │◀─ or Forking, if others are in its PID namespace; then EOF of a pipe
//	  │◀──────── Started{pid} | Failed│
//	  │ Prepare (only with hooks) ───▶│ clone+exec, Run ─────────────▶│  mounts
//	  │◀────────────── Started{pid}   │◀───────────────────── AtHooks │  waits
//	  │ Start ───────────────────────▶│ Done ────────────────────────▶│  … and goes on as above
//	  │ Exec (stdio fds) ────────────▶│ … the same, Run with Join …
//	  │◀──────── Started{pid} | Failed│
//	  │◀──── Exited (after the journal│ record is written)
//	  │ Attach (pipes) ──────────────▶│  what is printed goes to the log and to them
//	  │◀────────────── Done (stdin)   │
//	  │ Signal, Remove, Reopen, CloseStdin, List, Shutdown ▶ Done | Failed | Listing
//
// A daemon that starts later connects to the pod's listening socket, gets Ready,
// reads the exit journal and asks for a Listing. A new connection replaces the
// former one. EOF means that the peer died; each wait names what it expected.
//
// The package is linked into crisp-init and so imports only small packages.
package initproto

// Version is the protocol's version, carried by Ready. A daemon talks to pod
// inits of its own and of the previous version.
const Version = 1
