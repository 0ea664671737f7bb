//! Running a program in a host as a container runtime would: with the rights and the paths that it is given, and no
//! others.
//!
//! It shares the host's network, host name and IPC, and has a root and a process namespace of its own. Its root is the
//! image, with the program in it and the given paths of the host mounted where they are wanted. What it may do is taken
//! from it before it starts: groups and user, capabilities, and the way to more of either.
//!
//! # Guarantees
//! - What is given is what is asked for: [`Contained::start`] compares both as the kernel has them, and ends what differs.
//! - It ends with the one who started it, and with the lab.
//!
//! # Caveats
//! A runtime also filters system calls (seccomp), which is not done here.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::AsFd as _,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{prctl, signal::Signal},
    unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid, setsid},
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;

use super::{
    Host,
    node::{Bind, InitStage, bind, remount},
    proc::{ProcessId, take_precedence},
};

/// The hidden subcommand that runs [`run`].
pub const VERB: &str = "contained";
/// Where the program is, in its root.
const PROGRAMS: &str = "/usr/local/bin";
/// What every runtime puts into a container's `/dev`, of what programs need that have no terminal.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];
/// Capabilities by their number, capabilities(7), without `CAP_`.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// How long a killed program may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A capability, such as `NET_RAW`, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Capability(usize);

/// What a program may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// The user.
    pub user: u32,
    /// Its group.
    pub group: u32,
    /// Further groups.
    pub groups: BTreeSet<u32>,
    /// All that the program could ever have. A user other than root has none of them (execve(2)).
    pub capabilities: BTreeSet<Capability>,
    /// Whether no program that it starts may do more than it does (`no_new_privs`, prctl(2)).
    pub no_new_privileges: bool,
    /// Whether it cannot write to its root; what is mounted there is said with each mount.
    pub read_only_root: bool,
}

/// A program in a host, and all that it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The program, of this machine; it runs on the image's libraries.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment, apart from `PATH` and `HOME`.
    pub environment: Vec<(String, String)>,
    /// Directories of this machine, and where it sees them.
    pub mounts: Vec<Bind>,
    /// What it may do.
    pub rights: Rights,
}

/// What the hidden subcommand is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// First process of the host.
    init: ProcessId,
    image: PathBuf,
    /// An empty directory on which the root is put together.
    root: PathBuf,
    program: PathBuf,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    mounts: Vec<Bind>,
    rights: Rights,
}

/// A program that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Contained {
    /// Sets the namespaces up and waits for the program.
    keeper: Child,
    program: ProcessId,
}

// === impl Capability ===

impl Capability {
    fn bit(self) -> u64 {
        1 << self.0
    }
}

impl TryFrom<String> for Capability {
    type Error = anyhow::Error;

    fn try_from(name: String) -> Result<Self> {
        let bare = name.strip_prefix("CAP_").unwrap_or(&name);
        let number = CAPABILITIES.iter().position(|known| *known == bare);
        let number = number.with_context(|| format!("there is no capability {name:?}"))?;
        Ok(Self(number))
    }
}

impl From<Capability> for String {
    fn from(capability: Capability) -> Self {
        let name = CAPABILITIES.get(capability.0).copied();
        // There is no other way to make one than by its name.
        name.unwrap_or_default().to_owned()
    }
}

// === impl Contained ===

impl Contained {
    /// Starts a program in a host. What it writes goes to `log`.
    ///
    /// # Errors
    /// When it cannot be started, or the kernel has given it other rights than those asked for.
    pub async fn start(host: &Host, container: &Container, log: File) -> Result<Self> {
        let root = host.lab.state_dir().join("containers").join(host.name());
        fs::create_dir_all(&root).with_context(|| root.display().to_string())?;
        for Bind { source, .. } in &container.mounts {
            fs::create_dir_all(source).with_context(|| source.display().to_string())?;
        }
        let spec = Spec {
            init: host.init,
            image: super::Lab::attach(&host.lab)?.image().dir().to_owned(),
            root,
            program: container.program.clone(),
            args: container.args.clone(),
            environment: container.environment.clone(),
            mounts: container.mounts.clone(),
            rights: container.rights.clone(),
        };
        let mut command = tokio::process::Command::new(&host.exe);
        command
            .args([VERB, &serde_json::to_string(&spec)?])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true);
        let mut keeper = command.spawn().context("start a container")?;
        let told = keeper.stdout.take().context("no standard output")?;
        let mut lines = BufReader::new(told).lines();
        let (mut program, mut is_ready) = (None, false);
        // Two processes write, so either line can be the first.
        while !(is_ready && program.is_some())
            && let Some(line) = lines.next_line().await.context("a container's keeper")?
        {
            match line.strip_prefix("pid ") {
                Some(pid) => program = Some(ProcessId::of(pid.parse().context("process id")?)?),
                None => is_ready = line == "ready",
            }
        }
        let (Some(program), true) = (program, is_ready) else {
            bail!("{} could not be started", container.program.display());
        };
        let started = Self { keeper, program };
        started.verify(container).await?;
        program.prefer();
        Ok(started)
    }

    /// The program's process.
    pub fn id(&self) -> ProcessId {
        self.program
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Result<Option<String>> {
        let ended = self.keeper.try_wait().context("a container")?;
        Ok(ended.map(|ended| ended.to_string()))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.program.signal(signal)
    }

    /// Kills it as a crash would, and returns once it is gone.
    pub async fn kill(mut self) -> Result<()> {
        self.program.signal(Signal::SIGKILL)?;
        let gone = tokio::time::timeout(KILL_DEADLINE, self.keeper.wait()).await;
        gone.context("a killed container does not end")?
            .map(drop)
            .context("a container")
    }

    /// Asks it to end and returns once it has.
    ///
    /// # Errors
    /// When it does not end within `grace` (then it is killed), or ends with an error.
    pub async fn stop(mut self, grace: Duration) -> Result<()> {
        self.program.signal(Signal::SIGTERM)?;
        let ended = tokio::time::timeout(grace, self.keeper.wait())
            .await
            .with_context(|| format!("it did not end within {} s of SIGTERM", grace.as_secs()))?
            .context("a container")?;
        ensure!(ended.success(), "it ended with {ended}");
        Ok(())
    }

    /// What the kernel says of the program's rights is what they are to be.
    async fn verify(&self, container: &Container) -> Result<()> {
        let path = path_in_root(&container.program)?;
        let proc = PathBuf::from(format!("/proc/{}", self.program.pid));
        // Until it is executed it is still the one that gives its rights up.
        let executed = super::host::wait_until("a container's program to be executed", || {
            let exe = fs::read_link(proc.join("exe"));
            Ok(exe.is_ok_and(|exe| exe == path))
        });
        executed.await?;
        let status = fs::read_to_string(proc.join("status")).context("a container's status")?;
        let mounts = fs::read_to_string(proc.join("mounts")).context("a container's mounts")?;
        let found = rights_in(&status, &mounts).context("a container's rights")?;
        let due = Seen::of(&container.rights);
        ensure!(
            found == due,
            "the kernel has given a container other rights than those asked for: {found:x?}, not {due:x?}"
        );
        Ok(())
    }
}

/// Rights as the kernel tells of them.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    users: BTreeSet<u32>,
    /// Real, effective, saved and for files.
    own_groups: BTreeSet<u32>,
    groups: BTreeSet<u32>,
    inheritable: u64,
    permitted: u64,
    effective: u64,
    bounding: u64,
    ambient: u64,
    no_new_privileges: bool,
    read_only_root: bool,
}

impl Seen {
    fn of(rights: &Rights) -> Self {
        let bounding = mask(&rights.capabilities);
        let granted = if rights.user == 0 { bounding } else { 0 };
        Self {
            users: [rights.user].into(),
            own_groups: [rights.group].into(),
            groups: rights.groups.clone(),
            inheritable: 0,
            permitted: granted,
            effective: granted,
            bounding,
            ambient: 0,
            no_new_privileges: rights.no_new_privileges,
            read_only_root: rights.read_only_root,
        }
    }
}

/// Reads `/proc/PID/status` and `/proc/PID/mounts` (proc_pid_status(5), proc_pid_mounts(5)).
fn rights_in(status: &str, mounts: &str) -> Result<Seen> {
    let field = |name: &str| {
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim).with_context(|| format!("no {name}"))
    };
    let numbers = |name: &str| -> Result<BTreeSet<u32>> {
        let words = field(name)?.split_whitespace();
        words.map(|word| Ok(word.parse()?)).collect()
    };
    let capabilities =
        |name: &str| u64::from_str_radix(field(name)?, 16).with_context(|| name.to_owned());
    // The last one mounted on a place is the one that is seen.
    let root = mounts.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        (words.next()? == "/").then(|| words.nth(1))?
    });
    let options = root.context("no root")?;
    Ok(Seen {
        users: numbers("Uid")?,
        own_groups: numbers("Gid")?,
        groups: numbers("Groups")?,
        inheritable: capabilities("CapInh")?,
        permitted: capabilities("CapPrm")?,
        effective: capabilities("CapEff")?,
        bounding: capabilities("CapBnd")?,
        ambient: capabilities("CapAmb")?,
        no_new_privileges: field("NoNewPrivs")? == "1",
        read_only_root: options.split(',').any(|option| option == "ro"),
    })
}

fn mask(capabilities: &BTreeSet<Capability>) -> u64 {
    capabilities.iter().fold(0, |mask, one| mask | one.bit())
}

// === The hidden subcommand ===

/// Makes the namespaces, or, as first process in them, becomes the program.
///
/// Must be called before the process starts a thread: namespaces are changed for the calling thread only.
pub fn run(stage: InitStage, spec: &Spec) -> Result<ExitCode> {
    match stage {
        InitStage::Outer => keep(spec),
        InitStage::Inner => Err(become_program(spec)),
    }
}

fn keep(spec: &Spec) -> Result<ExitCode> {
    setsid().context("new session")?;
    // As every process in a host.
    take_precedence().context("priority")?;
    enter(spec.init)?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID).context("new namespaces")?;
    remount(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
    let root = build_root(spec)?;
    let exe = std::env::current_exe().context("path of this program")?;
    let mut command = Command::new(exe);
    let inner = Spec {
        root,
        ..spec.clone()
    };
    command.args([VERB, "--stage", "inner", &serde_json::to_string(&inner)?]);
    // SAFETY: the hook makes one system call, and allocates nothing.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
    }
    let mut child = command.spawn().context("inner stage of a container")?;
    writeln!(io::stdout(), "pid {}", child.id()).context("standard output")?;
    let status = child.wait().context("a container")?;
    // A shell's convention for a program that a signal ended.
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// Enters what a pod with the host's network shares with its node.
fn enter(init: ProcessId) -> Result<()> {
    let gone = || format!("the host's first process ({init}) is gone: the lab is down");
    let mut open = Vec::new();
    for (name, flag) in [
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
    ] {
        let path = format!("/proc/{}/ns/{name}", init.pid);
        open.push((File::open(path).with_context(gone)?, flag));
    }
    // After opening: now the files are known to be those of the right process.
    ensure!(init.is_alive(), gone());
    for (file, flag) in &open {
        setns(file, *flag).context("enter the host's namespaces")?;
    }
    Ok(())
}

/// Puts the root together, and returns where.
fn build_root(spec: &Spec) -> Result<PathBuf> {
    mount_new("tmpfs", &spec.root, MsFlags::empty(), None)?;
    let [upper, work, root] = ["upper", "work", "root"].map(|name| spec.root.join(name));
    for dir in [&upper, &work, &root] {
        fs::create_dir(dir).with_context(|| dir.display().to_string())?;
    }
    // As a runtime has it: the image's files below, and above them what is made for this container, mount points too.
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        spec.image.display(),
        upper.display(),
        work.display()
    );
    mount_new("overlay", &root, MsFlags::empty(), Some(&layers))?;
    let program = inside(&root, &path_in_root(&spec.program)?);
    File::create(&program).with_context(|| program.display().to_string())?;
    bind(&spec.program, &program, true)?;
    let devices = root.join("dev");
    mount_new("tmpfs", &devices, MsFlags::MS_NOSUID, Some("mode=755"))?;
    for device in DEVICES {
        let target = devices.join(device);
        File::create(&target).with_context(|| target.display().to_string())?;
        bind(&Path::new("/dev").join(device), &target, false)?;
    }
    // A new instance, because sysfs shows the network devices of the namespace that mounted it.
    mount_new("sysfs", &root.join("sys"), MsFlags::MS_RDONLY, None)?;
    for Bind {
        source,
        target,
        read_only,
    } in &spec.mounts
    {
        let target = inside(&root, target);
        fs::create_dir_all(&target).with_context(|| target.display().to_string())?;
        bind(source, &target, *read_only)?;
    }
    Ok(root)
}

/// As first process of the process namespace. Returns where something failed.
fn become_program(spec: &Spec) -> anyhow::Error {
    let prepared = (|| {
        mount_new("proc", &spec.root.join("proc"), MsFlags::empty(), None)?;
        chdir(&spec.root).context("enter the root")?;
        // The old root ends up on top of the new one (pivot_root(2), "pivot_root(".", ".")") and is then let go.
        pivot_root(".", ".").context("pivot_root")?;
        umount2(".", MntFlags::MNT_DETACH).context("let go of the old root")?;
        chdir("/").context("enter the new root")?;
        if spec.rights.read_only_root {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            remount(Path::new("/"), flags)?;
        }
        let mut command = Command::new(path_in_root(&spec.program)?);
        command
            .args(&spec.args)
            .env_clear()
            .envs(spec.environment.iter().map(|(name, value)| (name, value)))
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", "/root")
            .stdin(Stdio::null())
            // The keeper's standard output is for the keeper.
            .stdout(io::stderr().as_fd().try_clone_to_owned()?);
        writeln!(io::stdout(), "ready").context("standard output")?;
        give_up(&spec.rights)?;
        anyhow::Ok(command)
    })();
    match prepared {
        Ok(mut command) => anyhow!(command.exec()).context("cannot execute the program"),
        Err(error) => error,
    }
}

/// Gives up everything but these rights.
fn give_up(rights: &Rights) -> Result<()> {
    let kept = mask(&rights.capabilities);
    // The kernel may know more capabilities than this program: up to the first that it does not.
    for number in 0..64 {
        if kept & (1 << number) != 0 {
            continue;
        }
        // SAFETY: the call takes numbers only.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
        match nix::errno::Errno::result(dropped) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINVAL) => break,
            Err(error) => return Err(error).context("capabilities"),
        }
    }
    let groups: Vec<_> = rights.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).context("groups")?;
    let group = Gid::from_raw(rights.group);
    setresgid(group, group, group).context("group")?;
    let user = Uid::from_raw(rights.user);
    // Another user than root loses all capabilities by this, as it would by executing the program.
    setresuid(user, user, user).context("user")?;
    if rights.user == 0 {
        set_capabilities(kept)?;
    }
    // Changing the user has cleared it.
    prctl::set_pdeathsig(Signal::SIGKILL).context("end with the keeper")?;
    if rights.no_new_privileges {
        prctl::set_no_new_privs().context("no_new_privs")?;
    }
    Ok(())
}

/// Sets permitted and effective capabilities, capset(2), and clears those that would be inherited.
fn set_capabilities(mask: u64) -> Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let half = |mask: u64| {
        let mask = u32::try_from(mask & u64::from(u32::MAX)).unwrap_or_default();
        Data {
            effective: mask,
            permitted: mask,
            inheritable: 0,
        }
    };
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let data = [half(mask), half(mask >> 32)];
    // SAFETY: both structures are laid out as capset(2) says, and outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    nix::errno::Errno::result(result).context("capabilities")?;
    Ok(())
}

fn mount_new(kind: &str, target: &Path, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(Some(kind), target, Some(kind), flags, data)
        .with_context(|| format!("mount {kind} on {}", target.display()))
}

fn path_in_root(program: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program without name")?;
    Ok(Path::new(PROGRAMS).join(name))
}

/// A path of the container, from outside. `/var/run` is a link in the image, which would lead out of it.
fn inside(root: &Path, absolute: &Path) -> PathBuf {
    super::host::below(root, absolute)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capabilities(names: &[&str]) -> BTreeSet<Capability> {
        let made = names
            .iter()
            .map(|name| Capability::try_from((*name).to_owned()));
        made.map(Result::unwrap).collect()
    }

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        assert_eq!(mask(&capabilities(&["DAC_OVERRIDE", "NET_RAW"])), 0x2002);
        assert_eq!(mask(&capabilities(&["CAP_CHECKPOINT_RESTORE"])), 1 << 40);
        assert!(Capability::try_from("NET_RAWER".to_owned()).is_err());
    }

    const STATUS: &str = "Name:\tnode-hooks\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t \n\
        CapInh:\t0000000000000000\nCapPrm:\t0000000000002002\nCapEff:\t0000000000002002\n\
        CapBnd:\t0000000000002002\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\n";
    const MOUNTS: &str = "overlay / overlay ro,relatime,lowerdir=/x 0 0\nproc /proc proc rw 0 0\n";

    #[test]
    fn what_the_kernel_says_is_compared_in_every_point() {
        let rights = Rights {
            user: 0,
            group: 0,
            groups: BTreeSet::new(),
            capabilities: capabilities(&["NET_RAW", "DAC_OVERRIDE"]),
            no_new_privileges: true,
            read_only_root: true,
        };
        let due = Seen::of(&rights);
        assert_eq!(rights_in(STATUS, MOUNTS).unwrap(), due);
        for (from, to) in [
            ("CapEff:\t0000000000002002", "CapEff:\t0000000000003002"),
            ("CapBnd:\t0000000000002002", "CapBnd:\t000001ffffffffff"),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0"),
            ("Uid:\t0\t0", "Uid:\t0\t1"),
            ("Groups:\t ", "Groups:\t7 "),
        ] {
            let other = STATUS.replace(from, to);
            assert_ne!(rights_in(&other, MOUNTS).unwrap(), due, "{to}");
        }
        let writable = MOUNTS.replace("ro,", "rw,");
        assert_ne!(rights_in(STATUS, &writable).unwrap(), due);
    }

    #[test]
    fn another_user_than_root_has_no_capability() {
        let rights = Rights {
            user: 65_532,
            group: 65_532,
            groups: BTreeSet::new(),
            capabilities: capabilities(&["NET_RAW"]),
            no_new_privileges: true,
            read_only_root: true,
        };
        let seen = Seen::of(&rights);
        assert_eq!((seen.effective, seen.permitted), (0, 0));
        assert_eq!(seen.bounding, 0x2000);
    }
}
