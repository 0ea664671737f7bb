//! One process at a time brings a lab up, runs it or takes it down.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

use super::name::LabName;

/// The lock of a lab. The kernel releases it when its holder ends, however it ends.
#[derive(Debug)]
pub(crate) struct LabLock {
    path: PathBuf,
    /// Holds the process id of the holder, for the message to whoever comes second.
    _file: Flock<File>,
}

impl LabLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// When another process has it; the message names that process.
    pub(crate) fn take(name: &LabName) -> Result<Self> {
        let path = name.lock_path();
        // Again where a holder removed file or directory in between.
        loop {
            match attempt(&path).with_context(|| path.display().to_string())? {
                Attempt::Taken(file) => return Ok(Self { path, _file: file }),
                Attempt::Gone => {}
                Attempt::Held(holder) => {
                    bail!(
                        "lab {name} is in use by process {holder}: wait for it, or use another --name"
                    )
                }
            }
        }
    }

    /// Gives the lock up and removes its file, and the directory once no lab is left.
    pub(crate) fn remove(self) -> Result<()> {
        fs::remove_file(&self.path).with_context(|| self.path.display().to_string())?;
        if let Some(dir) = self.path.parent() {
            // It is not empty while there are other labs.
            _ = fs::remove_dir(dir);
        }
        Ok(())
    }
}

enum Attempt {
    Taken(Flock<File>),
    /// The file that was opened is not, or no longer, the lock.
    Gone,
    /// By this process.
    Held(String),
}

fn attempt(path: &Path) -> Result<Attempt> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut options = File::options();
    let file = match options
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
    {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Gone),
        Err(error) => return Err(error.into()),
    };
    let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) => file,
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder)?;
            return Ok(Attempt::Held(holder));
        }
        Err((_, error)) => return Err(error.into()),
    };
    // The lock of a file that its last holder has removed excludes nobody.
    let held = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) if (named.dev(), named.ino()) == (held.dev(), held.ino()) => {}
        _ => return Ok(Attempt::Gone),
    }
    file.set_len(0)?;
    file.rewind()?;
    write!(file, "{}", std::process::id())?;
    Ok(Attempt::Taken(file))
}
