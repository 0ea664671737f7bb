//! The hidden subcommand that a container is started by: what keeps it, and what becomes its program.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::{
        fd::AsFd as _,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{prctl, signal::Signal},
    unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid, setsid},
};

use super::super::{
    host::below,
    node::{Bind, InitStage, bind, remount},
    proc::{ProcessId, Prompt, take_precedence},
};
use super::{Rights, Spec, VERB, rights::mask};

/// Where the program is, in its root.
const PROGRAMS: &str = "/usr/local/bin";
/// What every runtime puts into a container's `/dev`, of what programs need that have no terminal.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

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
    take_precedence(Prompt::Serves).context("priority")?;
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

pub(super) fn path_in_root(program: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program without name")?;
    Ok(Path::new(PROGRAMS).join(name))
}

/// A path of the container, from outside. `/var/run` is a link in the image, which would lead out of it.
fn inside(root: &Path, absolute: &Path) -> PathBuf {
    below(root, absolute)
}
