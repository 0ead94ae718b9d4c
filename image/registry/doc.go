// Package registry fetches manifests and blobs of one repository from its
// registry, or from the mirrors an administrator configured for it.
//
// A Client holds what is the same for all pulls. Client.Open reads the
// hosts.toml of the repository's registry (afresh every time, so that an edited
// file counts from the next pull on) and gives a Source: the repository as seen
// through an ordered list of endpoints. A Source belongs to one pull and one
// set of credentials; Close ends its connections.
//
//	Client.Open ─▶ Source ─ Manifest ─▶ endpoint 1 (mirror) … endpoint n (the registry itself)
//	                      └ Blob ─────▶ a Reader that resumes and verifies
//
// Everything read is verified here: a Manifest's bytes against the digest asked
// for, a Blob's against digest and size before its Reader says io.EOF.
//
// # Who gets the credentials
//
// The credentials of a pull are sent to
//
//   - the registry of the reference (for docker.io: registry-1.docker.io), or
//     the address that a hosts.toml in that registry's own directory names as
//     its `server`;
//   - an endpoint whose host[:port] equals Credentials.ServerAddress, if that is
//     set; then to no other;
//   - the token realm such a registry names, if the realm is https and on the
//     same host or in the same registrable domain (auth.docker.io for
//     registry-1.docker.io), or is the very same scheme, host and port.
//
// To nobody else: not to mirrors, not over a redirect to another scheme, host
// or port, not to a realm elsewhere. A realm elsewhere is asked for an anonymous
// token.
//
// The challenge and the token exchange are go-containerregistry's
// (pkg/v1/remote/transport); requests are made here, because limits, resumption
// and the rules above need to see every one of them.
package registry
