// Package user decides as whom a container runs: it combines what the CRI request
// says, what the image's USER says, and the container's own /etc/passwd and
// /etc/group into numbers.
//
// The two files belong to the image's author, and so does USER. Numbers are parsed
// in one place, as unsigned decimals up to 2³¹-1; what begins like a number is never
// looked up as a name (CVE-2024-40635, CVE-2026-46680: USER 4294967296 that
// wrapped to root, or that passwd mapped to it). The files are opened inside the
// container's root, must be regular, and are read up to 10 MiB (CVE-2026-47262).
//
// [ImageUser] reads USER for ImageStatus with the same code, so that what the kubelet's
// runAsNonRoot check sees is what will run.
package user

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
)

var (
	// ErrInvalid is returned when the request, or the image's USER, can mean no user at all.
	ErrInvalid = errors.New("invalid user")
	// ErrNotFound is returned for a name that the container's /etc/passwd or /etc/group does not have.
	ErrNotFound = errors.New("no such user or group in the container")
	// ErrFile is returned when one of these files exists and cannot be used: not a regular file, too
	// large, a line too long, a number out of range.
	ErrFile = errors.New("unusable user database")
)

// MaxID is the largest uid and gid: the kubelet's validation allows no more, and the
// kernel means something else by (uint32)-1.
const MaxID = math.MaxInt32

// maxGroups is NGROUPS_MAX, setgroups(2).
const maxGroups = 65536

// maxName is how long a user or group name may be, bytes: far more than useradd(8) allows.
const maxName = 256

// Request is everything that has a say. It is stored in the container's record.
type Request struct {
	UID       *int64 `json:"uid,omitempty"`       // CRI run_as_user
	Username  string `json:"username,omitempty"`  // CRI run_as_username
	GID       *int64 `json:"gid,omitempty"`       // CRI run_as_group: an error without one of the above
	ImageUser string `json:"imageUser,omitempty"` // USER of the image: "", "1000", "name", "1000:50", "name:group"
	// SupplementalGroups are added to the primary group and, unless Strict, to
	// those that the container's /etc/group lists the user in.
	SupplementalGroups []int64 `json:"supplementalGroups,omitempty"`
	Strict             bool    `json:"strict,omitempty"` // CRI supplemental_groups_policy Strict
}

// Identity is who the container's processes are.
type Identity struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	// Groups are all groups, the primary one too (without it a file mode like 0604 can be got
	// around: CVE-2022-36109), ascending.
	Groups   []uint32 `json:"groups,omitempty"`
	Home     string   `json:"home,omitempty"`     // of /etc/passwd, "/" if it says nothing
	Username string   `json:"username,omitempty"` // "" when the uid has no name
}

// id is a user or a group as somebody wrote it: by number or by name.
type id struct {
	name   string // "" for a number
	number uint32
}

func (i id) String() string {
	if i.name != "" {
		return strconv.Quote(i.name)
	}
	return strconv.FormatUint(uint64(i.number), 10)
}

// parseID reads a number or a name. What begins with a digit or a sign is a number.
func parseID(s string) (id, error) {
	if s == "" {
		return id{}, fmt.Errorf("%w: empty name", ErrInvalid)
	}
	if c := s[0]; c == '-' || c == '+' || '0' <= c && c <= '9' {
		n, err := parseNumber(s)
		return id{number: n}, err
	}
	if len(s) > maxName {
		return id{}, fmt.Errorf("%w: name of %d bytes", ErrInvalid, len(s))
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c == 0x7f || c == ':' || c == ',' || c == '/' {
			return id{}, fmt.Errorf("%w: %q: a name has no %q", ErrInvalid, s, c)
		}
	}
	return id{name: s}, nil
}

// parseNumber accepts the one decimal spelling of 0 to MaxID.
func parseNumber(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil || len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("%w: %.40q: not a decimal number from 0 to %d", ErrInvalid, s, MaxID)
	}
	return uint32(n), nil
}

// number checks an id that came as a number.
func number(what string, n int64) (uint32, error) {
	if n < 0 || n > MaxID {
		return 0, fmt.Errorf("%w: %s %d is not from 0 to %d", ErrInvalid, what, n, MaxID)
	}
	return uint32(n), nil
}

// parseSpec reads USER of an image: user or user:group. ok is false for "".
func parseSpec(s string) (user id, group *id, ok bool, err error) {
	if s == "" {
		return id{}, nil, false, nil
	}
	u, g, hasGroup := strings.Cut(s, ":")
	if user, err = parseID(u); err != nil {
		return id{}, nil, false, err
	}
	if hasGroup {
		gid, err := parseID(g)
		if err != nil {
			return id{}, nil, false, fmt.Errorf("group: %w", err)
		}
		group = &gid
	}
	return user, group, true, nil
}

// ImageUser splits an image's USER as ImageStatus shows it: uid for a number, username for
// a name, neither for "". The group is checked and left out. It returns ErrInvalid for what Resolve would refuse.
func ImageUser(s string) (uid *int64, username string, err error) {
	user, _, ok, err := parseSpec(s)
	switch {
	case err != nil:
		return nil, "", fmt.Errorf("image USER %.100q: %w", s, err)
	case !ok:
		return nil, "", nil
	case user.name != "":
		return nil, user.name, nil
	}
	n := int64(user.number)
	return &n, "", nil
}

// who applies the precedence: run_as_user, run_as_username, USER, root. group is nil
// when nobody names one.
func (r *Request) who() (user id, group *id, err error) {
	byCRI := true
	switch {
	case r.UID != nil:
		user.number, err = number("run_as_user", *r.UID)
	case r.Username != "":
		if user, err = parseID(r.Username); err != nil {
			err = fmt.Errorf("run_as_username: %w", err)
		}
	default:
		byCRI = false
		if user, group, _, err = parseSpec(r.ImageUser); err != nil {
			err = fmt.Errorf("image USER %.100q: %w", r.ImageUser, err)
		}
	}
	if err != nil || r.GID == nil {
		return user, group, err
	}
	if !byCRI {
		// CRI: "run_as_group should only be specified when run_as_user or run_as_username is
		// specified; otherwise, the runtime MUST error."
		return id{}, nil, fmt.Errorf("%w: run_as_group without run_as_user or run_as_username", ErrInvalid)
	}
	gid, err := number("run_as_group", *r.GID)
	return user, &id{number: gid}, err
}

// Resolve finds out who r means in the container whose root directory is root (O_PATH will do).
// Numbers need no files; a name that is not there is ErrNotFound.
//
// Trust: everything below root may be hostile. Needs: read access to it, and /proc. Time is bounded by the
// size limits as long as root's file system answers.
func Resolve(root *os.File, r Request) (Identity, error) {
	user, group, err := r.who()
	if err != nil {
		return Identity{}, err
	}
	groups := make([]uint32, 0, len(r.SupplementalGroups)+1)
	for _, g := range r.SupplementalGroups {
		n, err := number("supplemental group", g)
		if err != nil {
			return Identity{}, err
		}
		groups = append(groups, n)
	}

	me, found, err := findUser(root, user)
	if err != nil {
		return Identity{}, fmt.Errorf("look up user %v: %w", user, err)
	}
	if !found && user.name != "" {
		return Identity{}, fmt.Errorf("user %v: %w", user, ErrNotFound)
	}
	out := Identity{UID: user.number, GID: me.gid, Home: me.home, Username: me.name}
	if user.name != "" {
		out.UID = me.uid
	}
	if out.Home == "" {
		out.Home = "/"
	}

	// The group file is needed for a group's name and for the user's memberships.
	member := me.name
	if r.Strict {
		member = ""
	}
	if group != nil && group.name == "" {
		out.GID = group.number
	}
	if member != "" || group != nil && group.name != "" {
		gid, ofImage, err := findGroups(root, group, member)
		if err != nil {
			return Identity{}, fmt.Errorf("look up groups: %w", err)
		}
		if group != nil && group.name != "" {
			if gid == nil {
				return Identity{}, fmt.Errorf("group %v: %w", group, ErrNotFound)
			}
			out.GID = *gid
		}
		groups = append(groups, ofImage...)
	}
	groups = append(groups, out.GID)
	slices.Sort(groups)
	out.Groups = slices.Compact(groups)
	if len(out.Groups) > maxGroups {
		return Identity{}, fmt.Errorf("%w: %d groups, the kernel takes %d", ErrInvalid, len(out.Groups), maxGroups)
	}
	return out, nil
}
