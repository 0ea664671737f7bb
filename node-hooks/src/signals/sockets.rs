//! Sockets that come and go with what listens on them, found by patterns of their paths.
//!
//! # Guarantees
//! - Below `/proc/<pid>/root`, a path is resolved as the process would: a symbolic link in a container's file system
//!   leads nowhere outside of it.
//! - A link where the socket should be is not followed: who may write into the directory cannot have the agent talk to
//!   another socket of the node.
//! - A socket is known by its inode. It is found once, however many paths lead to it, and a path that leads to another
//!   one by now is noticed.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::SystemTime;

use arp_proxy::Pattern;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use tokio::net::UnixStream;

/// Paths that one pattern is expanded to; a node has some thousand processes.
const MOST_PATHS: usize = 65_536;

/// Where sockets may be: an absolute path with shell wildcards, as in
/// `/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock` and
/// `/proc/[0-9]*/root/var/run/libvirt/virtqemud-sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPattern {
    text: String,
    /// As long as there are wildcards.
    parts: Vec<Part>,
    /// What follows, without a wildcard.
    rest: PathBuf,
    /// `rest` is a path in a process's root, which the parts end with.
    in_root: bool,
}

/// Not a pattern of paths.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathPatternError {
    /// It depends on a working directory, or climbs.
    #[error("{0:?} is no absolute path: give one that begins with / and has no ..")]
    NotAbsolute(String),
    /// It is wrong as a pattern.
    #[error("{text:?}: {reason}; wildcards are *, ? and [...]")]
    Wildcard {
        /// The pattern.
        text: String,
        /// What is wrong.
        reason: String,
    },
    /// A container could answer a wildcard with as many names as it likes.
    #[error("{0:?} has a wildcard behind /root: a container's own files must be named in full")]
    WildcardInRoot(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Name(String),
    Wild(Pattern),
}

/// A socket, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SocketId {
    device: u64,
    inode: u64,
    /// Where the file system knows: the next socket may get the inode of the last.
    made: Option<SystemTime>,
}

/// A socket that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SocketFile {
    pub(super) id: SocketId,
    /// The user who made it.
    owner: u32,
    place: Place,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// What `rest` is below: a directory, or a process's root.
    base: PathBuf,
    rest: PathBuf,
    in_root: bool,
}

// === impl PathPattern ===

impl FromStr for PathPattern {
    type Err = PathPatternError;

    fn from_str(text: &str) -> Result<Self, PathPatternError> {
        let path = text.strip_prefix('/');
        let mut names: Vec<&str> = path
            .unwrap_or_default()
            .split('/')
            .filter(|name| !matches!(*name, "" | "."))
            .collect();
        if path.is_none() || names.is_empty() || names.contains(&"..") {
            return Err(PathPatternError::NotAbsolute(text.to_owned()));
        }
        let in_root = matches!(names[..], ["proc", _, "root", _, ..]);
        let wild = |name: &&str| name.contains(['*', '?', '[']);
        let parts = if in_root {
            3
        } else {
            names.iter().rposition(wild).map_or(0, |last| last + 1)
        };
        let rest = names.split_off(parts.min(names.len()));
        if rest.iter().any(wild) {
            return Err(PathPatternError::WildcardInRoot(text.to_owned()));
        }
        let part = |name: &str| {
            if wild(&name) {
                Pattern::new(name).map(Part::Wild)
            } else {
                Ok(Part::Name(name.to_owned()))
            }
        };
        let parts = names.into_iter().map(part).collect::<Result<_, _>>();
        Ok(Self {
            parts: parts.map_err(|error| PathPatternError::Wildcard {
                text: text.to_owned(),
                reason: error.msg.to_owned(),
            })?,
            text: text.to_owned(),
            rest: rest.into_iter().collect(),
            in_root,
        })
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.text)
    }
}

impl PathPattern {
    /// Where there may be a socket. What cannot be read has none.
    fn places(&self) -> impl Iterator<Item = Place> {
        let mut bases = vec![PathBuf::from("/")];
        for part in &self.parts {
            match part {
                Part::Name(name) => bases.iter_mut().for_each(|base| base.push(name)),
                Part::Wild(pattern) => {
                    let below = bases.iter().flat_map(|base| matching(base, pattern));
                    bases = below.take(MOST_PATHS).collect();
                }
            }
        }
        bases.into_iter().map(|base| Place {
            base,
            rest: self.rest.clone(),
            in_root: self.in_root,
        })
    }
}

fn matching(directory: &Path, pattern: &Pattern) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let matches = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| pattern.matches(name))
    });
    matches.map(|entry| entry.path()).collect()
}

// === impl SocketFile ===

/// The sockets that there are now. Reads directories: not for a thread that must not wait.
pub(super) fn find(patterns: &[PathPattern]) -> Vec<SocketFile> {
    let mut found = BTreeMap::new();
    for place in patterns.iter().flat_map(PathPattern::places) {
        if let Ok((id, owner, _)) = place.open() {
            // The first path that leads to it: below /proc most likely a container's first process, which lasts.
            found.entry(id).or_insert(SocketFile { id, owner, place });
        }
    }
    found.into_values().collect()
}

impl SocketFile {
    /// The path in the URI of the driver of a libvirt daemon that listens there, `qemu:///system` or `qemu:///session`. A
    /// daemon that runs as root takes both; one that does not, where the user of a container is not the node's, takes
    /// the second alone.
    pub(super) fn driver_path(&self) -> &'static str {
        const ROOT: u32 = 0;
        if self.owner == ROOT {
            "system"
        } else {
            "session"
        }
    }

    /// A descriptor of the socket's file (`O_PATH`), which takes a path to it of any length (`unix(7)` has room for 108
    /// bytes): whoever has it as descriptor N connects to `/proc/self/fd/N`.
    ///
    /// # Errors
    /// `NotFound` if this socket is there no more, whatever has its path now.
    pub(super) fn open(&self) -> io::Result<OwnedFd> {
        let (id, _, file) = self.place.open()?;
        if id == self.id {
            Ok(file.into())
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    /// Connects to it.
    ///
    /// # Errors
    /// As those of [`open`](Self::open), or nobody listens.
    pub(super) async fn connect(&self) -> io::Result<UnixStream> {
        let file = self.open()?;
        UnixStream::connect(format!("/proc/self/fd/{}", file.as_raw_fd())).await
    }
}

impl fmt::Display for SocketFile {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.place.path().display().fmt(out)
    }
}

impl Place {
    fn path(&self) -> PathBuf {
        let mut path = self.base.clone();
        // Not join, which ends a path in a slash where there is nothing to add.
        path.extend(&self.rest);
        path
    }

    fn open(&self) -> io::Result<(SocketId, u32, File)> {
        let file = if self.in_root {
            let root = path_only(OFlag::O_DIRECTORY).open(&self.base)?;
            let how = OpenHow::new()
                .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
                .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
            File::from(openat2(root, &self.rest, how)?)
        } else {
            path_only(OFlag::O_NOFOLLOW).open(self.path())?
        };
        let status = file.metadata()?;
        if !status.file_type().is_socket() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let id = SocketId {
            device: status.dev(),
            inode: status.ino(),
            made: status.created().ok(),
        };
        Ok((id, status.uid(), file))
    }
}

fn path_only(flag: OFlag) -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags((OFlag::O_PATH | flag).bits());
    options
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn pattern(text: &str) -> PathPattern {
        text.parse().unwrap()
    }

    fn paths(found: &[SocketFile]) -> Vec<String> {
        found.iter().map(ToString::to_string).collect()
    }

    /// A socket in a directory of this name below `root`.
    fn socket(root: &Path, directory: &str) -> (PathBuf, UnixListener) {
        let path = root.join(directory).join("sock");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        (path, listener)
    }

    #[rstest]
    #[case("")]
    #[case("/")]
    #[case("run/sock")]
    #[case("/run/../etc/sock")]
    #[case("/proc/[0-9]*/root/run/*/sock")]
    #[case("/run/[a/sock")]
    fn no_pattern(#[case] text: &str) {
        let error = text.parse::<PathPattern>().unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }

    #[test]
    fn only_sockets_are_found_and_only_where_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let (there, _listener) = socket(root, "pod-a/run");
        fs::create_dir_all(root.join("pod-b/run")).unwrap();
        symlink(&there, root.join("pod-b/run/sock")).unwrap();
        fs::create_dir_all(root.join("pod-c/run")).unwrap();
        fs::write(root.join("pod-c/run/sock"), "").unwrap();
        let found = find(&[pattern(&format!("{}/pod-?/run/sock", root.display()))]);
        assert_eq!(paths(&found), [there.display().to_string()]);
    }

    #[test]
    fn one_socket_is_found_once() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _listener) = socket(directory.path(), "a");
        let path = path.display();
        let in_root = format!("/proc/{}/root{path}", std::process::id());
        let wild = format!("{}/?/*", directory.path().display());
        let found = find(&[
            pattern(&wild),
            pattern(&in_root),
            pattern(&path.to_string()),
        ]);
        assert_eq!(paths(&found), [path.to_string()]);
        assert_eq!(paths(&find(&[pattern(&in_root)])), [in_root]);
    }

    #[test]
    fn a_socket_with_the_same_path_is_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let (path, first) = socket(directory.path(), "a");
        let find = || find(&[pattern(path.to_str().unwrap())]);
        let before = find();
        // Kept, so that its inode is not given to the next.
        fs::rename(&path, path.with_file_name("old")).unwrap();
        let gone = before[0].open().unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        let _second = UnixListener::bind(&path).unwrap();
        assert_eq!(
            before[0].open().unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        assert_ne!(find()[0].id, before[0].id);
        drop(first);
    }

    #[tokio::test]
    async fn a_path_may_be_longer_than_an_address() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(120));
        fs::create_dir(&deep).unwrap();
        let (short, listener) = socket(directory.path(), "a");
        fs::rename(short, deep.join("sock")).unwrap();
        let found = find(&[pattern(deep.join("sock").to_str().unwrap())]);
        found[0].connect().await.unwrap();
        listener.accept().unwrap();
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[/a-c*?.\\[\\]-]{0,20}") {
            if let Ok(pattern) = text.parse::<PathPattern>() {
                prop_assert_eq!(pattern.to_string(), text);
            }
        }
    }
}
