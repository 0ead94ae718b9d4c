package cri

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crisp-cri/crisp/image"
)

func ref(s string) *runtimeapi.ImageSpec { return &runtimeapi.ImageSpec{Image: s} }

func TestPullImage(t *testing.T) {
	w := newWorld(t)
	got, err := w.image.PullImage(t.Context(), &runtimeapi.PullImageRequest{
		Image: ref("busybox"), Auth: &runtimeapi.AuthConfig{Username: "u", Password: "p", Auth: "a", ServerAddress: "s", IdentityToken: "i", RegistryToken: "r"},
	})
	if err != nil || got.ImageRef != imageID || w.images.pulled != "busybox" {
		t.Fatalf("got %v, %v", got, err)
	}
	if *w.images.auth != (image.Auth{Username: "u", Password: "p", Auth: "a", ServerAddress: "s", IdentityToken: "i", RegistryToken: "r"}) {
		t.Error("credentials were not passed on as they came")
	}
	_, silent := (&net.Dialer{Timeout: 1}).Dial("tcp", "127.0.0.1:1") // a registry that does not answer: net's timeouts say that they are context.DeadlineExceeded
	for _, tt := range []struct {
		err  error
		code codes.Code
		part string
	}{
		{image.ErrRegistryUnavailable, codes.Unknown, "RegistryUnavailable: "},
		{errors.Join(image.ErrRegistryUnavailable, silent), codes.Unknown, "RegistryUnavailable: "},
		{image.ErrUnauthorized, codes.Unauthenticated, ""},
		{image.ErrNotFound, codes.NotFound, ""},
		{image.ErrInvalidReference, codes.InvalidArgument, ""},
	} {
		w.images.err = fmt.Errorf("cannot pull x: %w", tt.err)
		_, err := w.image.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: ref("busybox"), Auth: &runtimeapi.AuthConfig{Password: "hunter2"}})
		wantStatus(t, err, tt.code, tt.part)
		if strings.Contains(err.Error(), "hunter2") {
			t.Error("a password is in the message")
		}
	}
}

// Requests about an image that name none, or a handler that is not there.
func TestImageRequestsRefused(t *testing.T) {
	w := newWorld(t)
	for name, call := range map[string]func(*runtimeapi.ImageSpec) error{
		"pull": func(s *runtimeapi.ImageSpec) error {
			_, err := w.image.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: s})
			return err
		},
		"status": func(s *runtimeapi.ImageSpec) error {
			_, err := w.image.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: s})
			return err
		},
		"remove": func(s *runtimeapi.ImageSpec) error {
			_, err := w.image.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: s})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			wantStatus(t, call(nil), codes.InvalidArgument, "image.image: ")
			wantStatus(t, call(ref("")), codes.InvalidArgument, "image.image: ")
			wantStatus(t, call(&runtimeapi.ImageSpec{Image: "x", RuntimeHandler: "y"}), codes.InvalidArgument, "image.runtime_handler: ")
			if w.images.pulled+w.images.removed != "" {
				t.Error("a refused request had an effect")
			}
		})
	}
}

func TestImageStatus(t *testing.T) {
	w := newWorld(t)
	got, err := w.image.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: ref("busybox"), Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	b := busybox()
	want := &runtimeapi.Image{
		Id: imageID, RepoTags: b.RepoTags, RepoDigests: b.RepoDigests, Size: 12345, Uid: &runtimeapi.Int64Value{Value: 1000}, Spec: ref(imageID),
	}
	if !proto.Equal(got.Image, want) {
		t.Errorf("got  %v\nwant %v", got.Image, want)
	}
	if !strings.Contains(got.Info["info"], `"imageSpec"`) || !strings.Contains(got.Info["info"], `"/work"`) {
		t.Errorf("info is %v", got.Info)
	}
	// One that is not there is no error.
	if got, err = w.image.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: ref("nothere"), Verbose: true}); err != nil || got.Image != nil {
		t.Errorf("absent: got %v, %v", got, err)
	}
}

// What the kubelet's runAsNonRoot check sees.
func TestImageUser(t *testing.T) {
	for _, tt := range []struct {
		user, wantName string
		wantUID        int64 // -1: none
	}{
		{"", "", -1}, {"1000", "", 1000}, {"1000:50", "", 1000}, {"www-data:www", "www-data", -1}, {"0", "", 0},
		{"4294967296", "4294967296", -1}, {"-1", "-1", -1}, {"00", "00", -1},
		{" " + strings.Repeat("é", 100), " " + strings.Repeat("é", 63) + "...", -1}, // cut within a character
	} {
		b := busybox()
		b.Config.Config.User, b.Size = tt.user, 0
		got := criImage(&b)
		uid := int64(-1)
		if got.Uid != nil {
			uid = got.Uid.Value
		}
		if uid != tt.wantUID || got.Username != tt.wantName {
			t.Errorf("USER %q: got uid %d, name %q", tt.user, uid, got.Username)
		}
		if got.Size == 0 {
			t.Error("size must not be 0")
		}
		if _, err := proto.Marshal(got); err != nil { // one such image would be the end of every list
			t.Errorf("USER %q: %v", tt.user, err)
		}
	}
}

func TestListImages(t *testing.T) {
	w := newWorld(t)
	for _, tt := range []struct {
		filter *runtimeapi.ImageFilter
		want   int
	}{
		{nil, 1}, {&runtimeapi.ImageFilter{}, 1}, {&runtimeapi.ImageFilter{Image: ref("busybox")}, 1}, {&runtimeapi.ImageFilter{Image: ref("nothere")}, 0},
	} {
		got, err := w.image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{Filter: tt.filter})
		if err != nil || len(got.Images) != tt.want || tt.want == 1 && got.Images[0].Id != imageID {
			t.Errorf("%v: got %v, %v", tt.filter, got, err)
		}
	}
}

func TestRemoveImage(t *testing.T) {
	w := newWorld(t)
	if _, err := w.image.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: ref("busybox")}); err != nil || w.images.removed != "busybox" || w.images.collected != 1 {
		t.Errorf("got %v, removed %q, collected %d times, want once: Remove alone frees nothing", err, w.images.removed, w.images.collected)
	}
	w.images.err = fmt.Errorf("%w: x", image.ErrNotFound)
	if _, err := w.image.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: ref("nothere")}); err != nil {
		t.Errorf("an image that is not there: %v", err)
	}
}

// The kubelet panics on nil values.
func TestImageFsInfo(t *testing.T) {
	w := newWorld(t)
	got, err := w.image.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	f := got.ImageFilesystems[0]
	if len(got.ImageFilesystems) != 1 || f.UsedBytes.GetValue() != 7 || f.InodesUsed == nil || f.FsId.GetMountpoint() != "/var/lib/crisp" || f.Timestamp == 0 {
		t.Errorf("got %v", got)
	}
}
