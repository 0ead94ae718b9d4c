// Package image keeps the node's container images: it pulls them, unpacks their
// layers into directories that overlayfs takes as they are, names them, and
// removes them.
//
// A Store is the one implementation of Images. What belongs where:
//
//	reference.go  names as Kubernetes users write them     registry/   hosts.toml, credentials, HTTP
//	pull.go       one pull, from reference to record       unpack/     a hostile archive into a directory
//	manifest.go   what a registry may say about an image   imagetest/  forged images and a registry, for tests
//	layer.go      what a layer is, for the overlay         fault/      the sentinel errors
//	tie.go        what layers take for granted of those below
//	flight.go     callers who want the same share it       gc.go       pins and garbage
//	record.go     the disk                                 progress.go pulls under way
//
// # A pull
//
//	resolve      manifest (through an index) and config, each verified by digest and checked
//	layers       in parallel: download ─▶ verify ─▶ inflate ─▶ diffID ─▶ files in tmp/, at the same time
//	             then, verified, rename into layers/
//	ties         what a layer leaves to those below it is looked up, where there is any: a small layer between
//	commit       manifest and config into oci/blobs; one syncfs; the image's record, fsynced: the commit point
//
// Compressed layers pass through memory and are not written, unless
// Config.KeepCompressed; their descriptors are kept, so an image's size is right.
//
// Layers are keyed by diffID, not by chainID: whiteouts are kept for overlayfs
// to apply, so a layer's directory does not depend on what is below it, and the
// layers of an image need not wait for each other. A manifest that pairs a blob
// with a diffID that the store has must still prove it once: nobody gets a layer
// by knowing its diffID. What a layer takes from those below it does depend on them: it is in its tie, a layer
// keyed by all of them (chainID), so that a layer shared by two images is tied to each for itself.
//
// # On disk
//
//	<root>/                       0700, as all directories of ours
//	├── lock                      flock(2) of the process that has the store open; its pid
//	├── images/<hex>.json         a record for each image id: descriptors, layers, names. Versioned, with a checksum
//	├── layers/<hex>/             a layer, by diffID: there only if verified; or a tie
//	│   ├── layer.json            its record: size on disk, blobs that inflate to it
//	│   ├── loose                 what its archive takes for granted of the layers below
//	│   └── fs/                   the overlay's lower: owners, modes, attributes as in the archive
//	├── oci/                      an OCI image layout (image-spec image-layout.md)
//	│   ├── oci-layout
//	│   ├── index.json            repeats the records, for other tools
//	│   └── blobs/sha256/<hex>    manifests and configs; layers with KeepCompressed
//	├── tmp/                      emptied by Open
//	├── trash/                    what was removed, on its way out
//	└── corrupt/                  records that could not be read, for the operator
//
// Nothing is changed in place; every file and layer comes to its name by rename.
//
// # What a crash leaves
//
//   - before the record: layers and blobs that no record names, which may not be
//     whole. Open removes them.
//   - between the two records when a tag moves: both have it; the higher Seq counts.
//   - during a removal: the record is hidden first (the commit point), then the
//     garbage goes.
//
// A removed image's record stays, hidden, while somebody holds its layers, so
// that after a restart Acquire still knows which those are. A record that cannot
// be read is moved to corrupt/ and reported by Problems; the image's config tells
// the layers again, and they stay, hidden, for their holders.
package image
