// Package unpack turns a layer's tar stream into a directory that serves as a
// lower directory of overlayfs.
//
// The archive is hostile: it was written by whoever could push to some
// registry, and we are root. The rules:
//
//   - A name is cleaned lexically against "/" and its parent directory is
//     opened with openat2(RESOLVE_IN_ROOT|RESOLVE_NO_MAGICLINKS) below the
//     layer's root; everything is then done by a single name relative to that
//     directory's file descriptor, without following a link in it. So symbolic
//     links may point where they like, and nothing is ever done outside.
//   - Nothing that exists is opened: files are made with O_CREAT|O_EXCL,
//     directories are held by O_PATH. No device, FIFO or socket of the archive
//     can make us wait or act.
//   - What is read into memory is bounded, by archive/tar for its headers (1
//     MiB), by us for the rest. Limits bound what lands on the disk.
//   - Char devices 0:0 and trusted.overlay.*, user.overlay.* attributes mean
//     something to overlayfs; only we make them.
//
// Nobody else may change the tree meanwhile; the caller keeps it in a directory
// of mode 0700.
//
// Overlay form (OCI image-spec layer.md "Whiteouts" to overlayfs.rst "whiteouts
// and opaque directories"): ".wh.NAME" becomes a char device 0:0 called NAME;
// ".wh..wh..opq" sets trusted.overlay.opaque=y on its directory. A whiteout
// applies to lower layers only, so one for a directory that this layer has
// itself makes that directory opaque, and one for any other entry that this
// layer has is void. Overlayfs does not heed the attribute on a layer's root: it is
// reported as Result.OpaqueRoot and left to the caller.
//
// Extended attributes: security.capability and user.* are kept, all others are
// dropped: labels and integrity marks (security.selinux, security.ima) are the
// host's to give.
//
// What an archive takes for granted of the layers below, the looks of directories it leaves out and
// files it has hard links to, is collected (Loose), and Tie makes what is to lie between this layer and the
// next so that all looks as if the archives had been unpacked one onto the other.
//
// Work is spread over three stages: one goroutine reads and inflates and hashes,
// the caller's one parses the archive and makes directories and links, a few more make
// small files, which is where most of the time goes (each is six system calls and a
// journalled inode).
package unpack
