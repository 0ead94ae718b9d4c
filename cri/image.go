package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/crisp-cri/crisp/image"
	"github.com/crisp-cri/crisp/runtime/user"
)

// PullImage returns the image's id: the same value as Image.id and image_id everywhere.
func (s *imageService) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	var c checker
	if c.imageSpec("image", r.GetImage(), s.cfg); c.err() != nil {
		return nil, c.err()
	}
	id, err := s.cfg.Images.Pull(ctx, r.GetImage().GetImage(), auth(r.GetAuth()))
	if err != nil {
		s.collect(context.WithoutCancel(ctx)) // layers that came through whole, of an image that did not
		return nil, err
	}
	return &runtimeapi.PullImageResponse{ImageRef: id}, nil
}

func auth(a *runtimeapi.AuthConfig) *image.Auth {
	if a == nil {
		return nil
	}
	return &image.Auth{
		Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(), ServerAddress: a.GetServerAddress(),
		IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
	}
}

func (s *imageService) ListImages(_ context.Context, r *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	resp := &runtimeapi.ListImagesResponse{}
	if ref := r.GetFilter().GetImage().GetImage(); ref != "" {
		img, err := s.cfg.Images.Resolve(ref)
		switch {
		case errors.Is(err, image.ErrNotFound):
			return resp, nil
		case err != nil:
			return nil, err
		}
		resp.Images = append(resp.Images, criImage(&img))
		return resp, nil
	}
	for _, img := range s.cfg.Images.List() {
		resp.Images = append(resp.Images, criImage(&img))
	}
	return resp, nil
}

func criImage(img *image.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id:          img.ID,
		RepoTags:    img.RepoTags,
		RepoDigests: img.RepoDigests,
		Size:        uint64(max(img.Size, 1)), // never 0: critest, and the kubelet's statistics
		Spec:        &runtimeapi.ImageSpec{Image: img.ID},
		Pinned:      img.Pinned,
	}
	// The kubelet decides about runAsNonRoot by this: uid for a number, username for a name.
	uid, name, err := user.ImageUser(img.Config.Config.User)
	switch {
	case err != nil:
		// No container can be run as that; shown as a name, so that nobody takes it for a number.
		out.Username = clip(img.Config.Config.User)
	case uid != nil:
		out.Uid = &runtimeapi.Int64Value{Value: *uid}
	default:
		out.Username = name
	}
	return out
}

// ImageStatus of an image that is not there is no error, but no image.
func (s *imageService) ImageStatus(_ context.Context, r *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	var c checker
	if c.imageSpec("image", r.GetImage(), s.cfg); c.err() != nil {
		return nil, c.err()
	}
	img, err := s.cfg.Images.Resolve(r.GetImage().GetImage())
	switch {
	case errors.Is(err, image.ErrNotFound):
		return &runtimeapi.ImageStatusResponse{}, nil
	case err != nil:
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(&img)}
	if r.GetVerbose() {
		resp.Info, err = inJSON(map[string]any{"info": map[string]any{"imageSpec": img.Config, "pulledAt": img.PulledAt}})
		if err != nil {
			return nil, fmt.Errorf("cannot describe image %q: %w", img.ID, err)
		}
	}
	return resp, nil
}

// RemoveImage removes an image with all its tags; one that is not there is removed.
func (s *imageService) RemoveImage(ctx context.Context, r *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	var c checker
	if c.imageSpec("image", r.GetImage(), s.cfg); c.err() != nil {
		return nil, c.err()
	}
	if err := s.cfg.Images.Remove(ctx, r.GetImage().GetImage()); err != nil && !errors.Is(err, image.ErrNotFound) {
		return nil, err
	}
	s.collect(ctx)
	return &runtimeapi.RemoveImageResponse{}, nil
}

// collect frees what no image and no container uses. An image that was removed is gone from every list: that its
// disk space could not be freed is no reason to say it is not. The next removal tries again.
func (s *imageService) collect(ctx context.Context) {
	if err := s.cfg.Images.CollectGarbage(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Could not free all of an image, ignoring")
	}
}

// ImageFsInfo: container_filesystems stays empty, because writable layers are on the same file system as images.
func (s *imageService) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	mountpoint, bytes, inodes, err := s.cfg.Images.Usage()
	if err != nil {
		return nil, fmt.Errorf("cannot measure the image file system: %w", err)
	}
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: []*runtimeapi.FilesystemUsage{{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: mountpoint},
		UsedBytes:  &runtimeapi.UInt64Value{Value: bytes}, // the kubelet does not check for nil
		InodesUsed: &runtimeapi.UInt64Value{Value: inodes},
	}}}, nil
}
