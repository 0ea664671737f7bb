//! The Unix socket that a `Plugin` object names.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};

/// Owner and group. virt-handler runs as root.
const MODE: u32 = 0o660;

/// Why a socket cannot be made.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another process serves there.
    #[error("{path} is served by another process: does another agent run on this node?")]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// What is there is not a socket that this user's process left behind.
    #[error("{path} is there, and is no socket that an agent left behind: remove it by hand")]
    Foreign {
        /// The path.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("cannot serve on {path}: is its directory there, and may this user write to it?")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A Unix socket in the file system, until it is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: what a later process put in its place is not this one's to remove.
    identity: Option<(u64, u64)>,
}

impl Socket {
    /// Makes the socket, in place of one that a process that is gone has left.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        make_way(path)?;
        // Made beside its place and moved there: nobody finds it before it has its mode.
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        make_way(&beside)?;
        let listener = UnixListener::bind(&beside).map_err(failed)?;
        let placed = fs::set_permissions(&beside, Permissions::from_mode(MODE))
            .and_then(|()| fs::rename(&beside, path));
        if let Err(source) = placed {
            let _ = fs::remove_file(&beside);
            return Err(failed(source));
        }
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: identity(path),
        })
    }

    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Gone already is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// Removes a socket of this user's that nobody serves any more, and nothing else.
fn make_way(path: &Path) -> Result<(), SocketError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(SocketError::Io {
                path: path.to_owned(),
                source,
            });
        }
    };
    let path = || path.to_owned();
    let is_ours = found.uid() == nix::unistd::geteuid().as_raw();
    if !found.file_type().is_socket() || !is_ours {
        return Err(SocketError::Foreign { path: path() });
    }
    match std::os::unix::net::UnixStream::connect(path()) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(_) | Err(_) => return Err(SocketError::Taken { path: path() }),
    }
    match fs::remove_file(path()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SocketError::Io {
            path: path(),
            source: error,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_for_owner_and_group_and_leaves_no_trace() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("segue.sock");
        let socket = Socket::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        let (accepted, connected) = tokio::join!(socket.accept(), UnixStream::connect(&path));
        assert!(accepted.is_ok() && connected.is_ok());
        drop(socket);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_dead_socket_makes_way_and_nothing_else_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("segue.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let living = Socket::bind(&path).unwrap();
        let second = Socket::bind(&path).unwrap_err();
        assert!(matches!(second, SocketError::Taken { .. }), "{second}");
        assert!(UnixStream::connect(&path).await.is_ok());
        drop(living);
        fs::write(&path, "precious").unwrap();
        let file = Socket::bind(&path).unwrap_err();
        assert!(matches!(file, SocketError::Foreign { .. }), "{file}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn what_another_put_in_its_place_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("segue.sock");
        let first = Socket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Socket::bind(&path).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).await.is_ok());
        drop(second);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_missing_directory_is_named() {
        let error = Socket::bind(Path::new("/nonexistent/segue.sock")).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/segue.sock"),
            "{error}"
        );
    }
}
