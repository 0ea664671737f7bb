//! Where a lab's state is: in memory.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use super::name::LabName;

/// Makes a lab's state directory, on a file system in memory.
///
/// It holds what the hosts have in `/run`, where programs count on that: libvirt writes a domain's state there and waits
/// for the disk (fsync(2)) before it tells anybody that the domain pauses. `/run` of a machine is in memory, of a container
/// it may not be.
pub(super) fn make(lab: &LabName) -> Result<()> {
    let dir = lab.state_dir();
    let shown = || dir.display().to_string();
    fs::create_dir_all(&dir).with_context(shown)?;
    if statfs(&dir).with_context(shown)?.filesystem_type() != TMPFS_MAGIC {
        let flags = MsFlags::MS_NOSUID;
        mount(Some("segue"), &dir, Some("tmpfs"), flags, Some("mode=755"))
            .with_context(|| format!("mount tmpfs on {}", dir.display()))?;
    }
    Ok(())
}

/// Removes it. Returns whether there was one.
pub(super) fn remove(lab: &LabName) -> Result<bool> {
    let dir = lab.state_dir();
    unmount(&dir)?;
    match fs::remove_dir_all(&dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("remove {}", dir.display())),
    }
}

fn unmount(dir: &Path) -> Result<()> {
    loop {
        match umount2(dir, MntFlags::MNT_DETACH) {
            // There may be one below: of a run that crashed in between.
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("unmount {}", dir.display()));
            }
        }
    }
}
