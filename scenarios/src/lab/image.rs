//! The Debian image that every host of a lab has as its root.

use std::{
    env, fs,
    fs::File,
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use uuid::Uuid;

use super::progress::Progress;

/// Where a lab's initramfs images appear in every host.
pub(crate) const GUEST_DIR: &str = "/segue";

const PACKAGES: &[&str] = &[
    "busybox-static",
    "etcd-server",
    "ethtool",
    "iproute2",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "linux-image-cloud-amd64",
    "nftables",
    "openvswitch-common",
    "openvswitch-switch",
    "ovn-central",
    "ovn-host",
    "qemu-system-x86",
    "tcpdump",
];

/// Directories of a host that are its own, empty at first; the image is read-only, so it must have them.
pub(crate) const OWN_DIRS: &[&str] = &[
    "/run",
    "/tmp",
    "/root",
    "/var/tmp",
    "/var/log",
    "/var/lib/ovn",
    "/var/lib/openvswitch",
    "/var/lib/libvirt",
    "/var/cache/libvirt",
    "/etc/libvirt",
    "/etc/openvswitch",
];

/// Options of the build that shape the image: nobody reads manual pages there, and no host boots its kernel from disk.
const OPTIONS: &[&str] = &[
    "--variant=apt",
    "--aptopt=Acquire::Languages \"none\"",
    // A mirror that lags can hold a Release file that is past its time; `warn_if_stale` says so.
    "--aptopt=Acquire::Check-Valid-Until \"false\"",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
];

/// Keeps until when the suite's Release file is valid: the lists themselves are removed at the end.
const KEEP_VALIDITY: &str = "--customize-hook=sed -n 's/^Valid-Until: //p' \
    \"$1\"/var/lib/apt/lists/*Release >\"$1/etc/segue-release-valid-until\"";

/// libvirt's QEMU driver does not start without the user and group that it was built for, although another user is
/// configured; in Debian before 13 a package creates them that the lab has no other use for. Numbers as Debian has them.
const LIBVIRT_USER: &str = "--customize-hook=\
    grep -q ^libvirt-qemu: \"$1/etc/group\" || echo libvirt-qemu:x:64055: >>\"$1/etc/group\"; \
    grep -q ^libvirt-qemu: \"$1/etc/passwd\" || \
    echo libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin >>\"$1/etc/passwd\"";

/// An emulated guest that QEMU 7.2 migrates can arrive with damaged memory: in two of six migrations its kernel panicked
/// on the target within moments. With the QEMU of Debian 12's backports it did in none of fourteen. Of the rest, which is
/// what that suite is there for, nothing is taken from them.
const NEWER_QEMU: &[&str] = &[
    "--setup-hook=sed -n 's/ bookworm main$/ bookworm-backports main/p' \"$1/etc/apt/sources.list\" \
        >\"$1/etc/apt/sources.list.d/backports.list\"",
    "--setup-hook=printf '%s\\n' 'Package: qemu-* seabios ipxe-qemu' 'Pin: release n=bookworm-backports' \
        'Pin-Priority: 990' >\"$1/etc/apt/preferences.d/qemu\"",
];

/// Host commands that the lab needs, and the Debian package of each.
const HOST_COMMANDS: &[(&str, &str)] = &[
    ("mmdebstrap", "mmdebstrap"),
    ("ip", "iproute2"),
    ("ethtool", "ethtool"),
    ("unshare", "util-linux"),
];

/// A Debian suite, such as `trixie`, `bookworm` or `sid`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suite(String);

/// An image in the cache. Running labs never change it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    suite: Suite,
    dir: PathBuf,
}

// === impl Suite ===

impl Suite {
    /// Options of the build that only this suite needs.
    fn options(&self) -> &'static [&'static str] {
        if self.0 == "bookworm" {
            NEWER_QEMU
        } else {
            &[]
        }
    }
}

impl Default for Suite {
    fn default() -> Self {
        Self("trixie".to_owned())
    }
}

impl std::str::FromStr for Suite {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure!(
            !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase()),
            "suite {text:?}: give a Debian suite by its code name, such as trixie, bookworm or sid"
        );
        Ok(Self(text.to_owned()))
    }
}

impl std::fmt::Display for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Image ===

impl Image {
    /// The image of a suite, built if the cache has none: some two minutes, most of it downloading.
    ///
    /// Builds exclude each other, and an interrupted one leaves nothing that is taken for an image: it is put together
    /// in a directory of another name, which the next build removes.
    ///
    /// # Errors
    /// When a host command is missing (the message names the package) or the build fails (it ends with the tool's own
    /// last lines).
    pub async fn ensure(suite: &Suite, progress: &dyn Progress) -> Result<Self> {
        check_host_commands()?;
        let images = cache_dir()?.join("images");
        let dir = images.join(format!("{suite}-{}", recipe_hash(suite)));
        let image = Self {
            suite: suite.clone(),
            dir,
        };
        if image.dir.is_dir() {
            return Ok(image);
        }
        fs::create_dir_all(&images).with_context(|| images.display().to_string())?;
        let _lock = build_lock(&images.join(".lock"), progress).await?;
        if !image.dir.is_dir() {
            image.build(&images, progress).await?;
        }
        Ok(image)
    }

    /// Its directory: the root of a Debian system.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The Debian suite it was built from.
    pub fn suite(&self) -> &Suite {
        &self.suite
    }

    /// Release of its kernel, as `uname -r` shows it in a guest.
    pub fn kernel(&self) -> Result<String> {
        let modules = self.dir.join("lib/modules");
        let mut releases = fs::read_dir(&modules)
            .and_then(|entries| {
                entries
                    .map(|entry| entry.map(|entry| entry.file_name()))
                    .collect::<io::Result<Vec<_>>>()
            })
            .with_context(|| modules.display().to_string())?;
        releases.sort();
        let release = releases
            .pop()
            .with_context(|| format!("no kernel in {}", modules.display()))?;
        Ok(release.to_string_lossy().into_owned())
    }

    /// Version of an installed Debian package, such as `25.03.0-1` for `ovn-central`.
    pub fn package_version(&self, package: &str) -> Result<String> {
        let status = self.dir.join("var/lib/dpkg/status");
        let status = fs::read_to_string(&status).with_context(|| status.display().to_string())?;
        package_version(&status, package)
            .with_context(|| format!("package {package} is not in the image"))
    }

    async fn build(&self, images: &Path, progress: &dyn Progress) -> Result<()> {
        progress.step(&format!("Building the Debian image ({}, once)", self.suite));
        for entry in fs::read_dir(images).with_context(|| images.display().to_string())? {
            let entry = entry?;
            if entry
                .file_name()
                .to_string_lossy()
                .starts_with(".building-")
            {
                fs::remove_dir_all(entry.path())
                    .with_context(|| entry.path().display().to_string())?;
            }
        }
        let building = images.join(format!(".building-{}-{}", self.suite, std::process::id()));
        let mut command = tokio::process::Command::from(self.recipe(&building));
        let mut child = command
            .kill_on_drop(true)
            .spawn()
            .context("cannot start mmdebstrap")?;
        let last = match child.stderr.take() {
            Some(stderr) => follow(stderr, progress).await?,
            None => Vec::new(),
        };
        let status = child.wait().await.context("mmdebstrap")?;
        ensure!(
            status.success(),
            "mmdebstrap failed ({status}):\n{}",
            last.join("\n")
        );
        let kept = building.join("etc/segue-release-valid-until");
        let kept = fs::read_to_string(&kept).with_context(|| kept.display().to_string())?;
        if let Some(until) = past_validity(&kept, Timestamp::now()) {
            progress.step(&format!(
                "warning: the mirror's Release file of {} was valid until {until} only: \
                 its packages are not the newest",
                self.suite
            ));
        }
        fs::rename(&building, &self.dir).with_context(|| self.dir.display().to_string())
    }

    fn recipe(&self, building: &Path) -> Command {
        let directories: Vec<_> = OWN_DIRS
            .iter()
            .chain([&GUEST_DIR])
            .map(|dir| format!("\"$1{dir}\""))
            .collect();
        // In namespaces of their own, so that nothing of a killed build stays mounted or running.
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "mmdebstrap",
            ])
            .args(OPTIONS)
            .args(self.suite.options())
            .args([LIBVIRT_USER, KEEP_VALIDITY])
            .arg(format!("--include={}", PACKAGES.join(",")))
            .arg(format!(
                "--customize-hook=mkdir -p {}",
                directories.join(" ")
            ))
            .arg(&self.suite.0)
            .arg(building)
            // Debian's kernel packages then build no initramfs, which nothing would read.
            .env("INITRD", "No")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }
}

/// Where images are kept: `$XDG_CACHE_HOME/segue`, by default `~/.cache/segue`.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("segue"))
        .context("neither XDG_CACHE_HOME nor HOME is set")
}

/// A short name for everything that shapes an image, so that a changed recipe never meets an old image.
fn recipe_hash(suite: &Suite) -> String {
    let recipe = [
        &[suite.0.as_str(), GUEST_DIR, LIBVIRT_USER, KEEP_VALIDITY],
        PACKAGES,
        OWN_DIRS,
        OPTIONS,
        suite.options(),
    ]
    .concat()
    .join("\n");
    content_hash(recipe.as_bytes())
}

/// Twelve hexadecimal digits that stand for these bytes.
pub(crate) fn content_hash(bytes: &[u8]) -> String {
    let mut hash = Uuid::new_v5(&Uuid::NAMESPACE_OID, bytes)
        .simple()
        .to_string();
    hash.truncate(12);
    hash
}

fn check_host_commands() -> Result<()> {
    let path = env::var_os("PATH").unwrap_or_default();
    let missing: Vec<_> = HOST_COMMANDS
        .iter()
        .filter(|(command, _)| !env::split_paths(&path).any(|dir| dir.join(command).is_file()))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        bail!(
            "the lab needs {0} on this machine: apt-get install {0}",
            missing.join(" ")
        );
    }
    Ok(())
}

async fn build_lock(path: &Path, progress: &dyn Progress) -> Result<Flock<File>> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    let mut told = false;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, nix::errno::Errno::EWOULDBLOCK)) => file = back,
            Err((_, error)) => return Err(error).with_context(|| path.display().to_string()),
        }
        if !told {
            progress.step("Waiting for another build of the Debian image");
            told = true;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Shows each line and returns the last few, which tell why a build failed.
async fn follow(output: impl AsyncRead + Unpin, progress: &dyn Progress) -> Result<Vec<String>> {
    let mut lines = BufReader::new(output).lines();
    let mut last = Vec::new();
    while let Some(line) = lines.next_line().await.context("output of mmdebstrap")? {
        progress.detail(line.trim_start_matches("I: "));
        last.push(line);
        if last.len() > 20 {
            last.remove(0);
        }
    }
    Ok(last)
}

/// The first of these dates, one a line as a Release file has them (RFC 2822 with the zone "UTC"), that is over.
fn past_validity(dates: &str, now: Timestamp) -> Option<&str> {
    let over = |date: &&str| {
        let date = date.trim_end_matches("UTC").to_owned() + "+0000";
        jiff::fmt::rfc2822::parse(&date).is_ok_and(|until| until.timestamp() < now)
    };
    dates.lines().find(over)
}

fn package_version(status: &str, package: &str) -> Option<String> {
    let header = format!("Package: {package}");
    let paragraph = status
        .split("\n\n")
        .find(|paragraph| paragraph.lines().next() == Some(header.as_str()))?;
    let version = paragraph
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))?;
    Some(version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_tells_suites_apart() {
        assert_ne!(
            recipe_hash(&Suite::default()),
            recipe_hash(&"sid".parse().unwrap())
        );
    }

    #[test]
    fn suites_that_could_escape_the_cache_are_refused() {
        for bad in ["", "../x", "a b", "-x", "Trixie"] {
            assert!(bad.parse::<Suite>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_release_file_that_is_past_its_time_is_noticed() {
        let dates = "Sat, 05 Dec 2026 14:02:28 UTC\nSun, 22 Nov 2026 08:14:15 UTC\n";
        let now = |text: &str| text.parse().unwrap();
        let past = |at| past_validity(dates, now(at));
        assert_eq!(past("2026-11-22T08:14:15Z"), None);
        assert_eq!(
            past("2026-11-29T00:00:00Z"),
            Some("Sun, 22 Nov 2026 08:14:15 UTC")
        );
        assert_eq!(past_validity("", now("2026-11-29T00:00:00Z")), None);
    }

    #[test]
    fn a_packages_version_is_not_taken_from_its_neighbour() {
        let status = "Package: ovn-common\nVersion: 1\n\nPackage: ovn\nStatus: install ok\nVersion: 25.03.0-1\n";
        assert_eq!(package_version(status, "ovn").as_deref(), Some("25.03.0-1"));
        assert_eq!(package_version(status, "ov"), None);
    }
}
