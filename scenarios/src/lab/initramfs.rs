//! The guests' root: an initramfs with busybox, the kernel modules of their network interface, and the probe.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{Image, image::content_hash};

/// What a guest needs beyond what a kernel has built in: its interface, the bus it is on, and what DHCP works with.
const MODULES: &[&str] = &["virtio_pci", "virtio_net", "af_packet"];

/// Runs as the guest's first process.
const INIT: &str = include_str!("guest-init.sh");

/// Takes what DHCP gives.
const DHCP: &str = include_str!("guest-dhcp.sh");

/// Builds the initramfs of an image's guests in `dir` and returns its file name, which changes with its content; what
/// is there already is not written again.
///
/// `probe` is a statically linked program that runs as `dataplane-probe reflect` in the guest; without it the guest
/// echoes what comes over TCP to the same port, 7000.
pub fn build(image: &Image, probe: Option<&Path>, dir: &Path) -> Result<String> {
    let archive = archive(image, probe)?;
    let name = format!("initramfs-{}", content_hash(&archive));
    let path = dir.join(&name);
    if !path.exists() {
        let partial = path.with_extension(format!("partial-{}", std::process::id()));
        fs::write(&partial, archive).with_context(|| partial.display().to_string())?;
        fs::rename(&partial, &path).with_context(|| path.display().to_string())?;
    }
    Ok(name)
}

fn archive(image: &Image, probe: Option<&Path>) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
    let busybox = image.dir().join("usr/bin/busybox");
    let mut cpio = Cpio::default();
    for dir in ["bin", "dev", "modules", "proc", "sys", "tmp"] {
        cpio.directory(dir);
    }
    cpio.file("init", 0o755, INIT.as_bytes());
    cpio.file("dhcp", 0o755, DHCP.as_bytes());
    cpio.file("bin/busybox", 0o755, &read(&busybox)?);
    if let Some(probe) = probe {
        let program = read(probe)?;
        check_static(&program).with_context(|| format!("{} in the guest", probe.display()))?;
        cpio.file("bin/dataplane-probe", 0o755, &program);
    }

    let modules = image.dir().join("lib/modules").join(image.kernel()?);
    let dependencies =
        String::from_utf8(read(&modules.join("modules.dep"))?).context("modules.dep")?;
    let built_in =
        String::from_utf8(read(&modules.join("modules.builtin"))?).context("modules.builtin")?;
    for (index, path) in load_order(&dependencies, &built_in, MODULES)?
        .iter()
        .enumerate()
    {
        // The number keeps the order of loading.
        let name = format!("modules/{index:02}-{}.ko", module_name(path));
        cpio.file(&name, 0o644, &decompressed(&busybox, &modules.join(path))?);
    }
    Ok(cpio.finish())
}

/// A program that needs an interpreter does not start in the guest, and nothing would say so but silence.
fn check_static(elf: &[u8]) -> Result<()> {
    const PT_INTERP: u32 = 3;
    let at = |offset: usize, length: usize| {
        elf.get(offset..offset + length)
            .context("truncated ELF file")
    };
    let number = |offset, length| {
        anyhow::Ok(
            at(offset, length)?
                .iter()
                .rev()
                .fold(0usize, |value, byte| value << 8 | usize::from(*byte)),
        )
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        bail!("not a 64-bit little-endian ELF program");
    }
    // Offsets of the ELF-64 header and program headers: elf(5).
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        if at(table + index * size, 4)? == PT_INTERP.to_le_bytes() {
            bail!("not statically linked: build it with RUSTFLAGS=-Ctarget-feature=+crt-static");
        }
    }
    Ok(())
}

/// Paths of the modules to load, dependencies first; what the kernel has built in is left out. `dependencies` and
/// `built_in` are depmod's modules.dep and modules.builtin.
fn load_order(dependencies: &str, built_in: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let mut order = Vec::new();
    for name in wanted {
        if built_in.lines().any(|path| module_name(path) == *name) {
            continue;
        }
        let path = dependencies
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0))
            .find(|path| module_name(path) == *name)
            .with_context(|| format!("the kernel has no module {name}"))?;
        visit(dependencies, path, &mut BTreeSet::new(), &mut order);
    }
    Ok(order)
}

fn visit(dependencies: &str, path: &str, seen: &mut BTreeSet<String>, order: &mut Vec<String>) {
    if !seen.insert(path.to_owned()) || order.iter().any(|done| done == path) {
        return;
    }
    let line = dependencies
        .lines()
        .find_map(|line| line.strip_prefix(path)?.strip_prefix(':'));
    for dependency in line.unwrap_or_default().split_whitespace() {
        visit(dependencies, dependency, seen, order);
    }
    order.push(path.to_owned());
}

/// `virtio_net` for `kernel/drivers/net/virtio_net.ko.xz`.
fn module_name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file)
}

fn decompressed(busybox: &Path, module: &Path) -> Result<Vec<u8>> {
    let shown = || module.display().to_string();
    let filter = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "unxz",
        Some("gz") => "gunzip",
        Some("ko") => return fs::read(module).with_context(shown),
        _ => bail!("{}: unknown compression", shown()),
    };
    // The image's own busybox is static, so it runs on this machine, which may lack xz.
    let file = fs::File::open(module).with_context(shown)?;
    let output = Command::new(busybox)
        .args([filter, "-c"])
        .stdin(file)
        .stderr(Stdio::piped())
        .output()
        .with_context(|| busybox.display().to_string())?;
    if !output.status.success() {
        bail!(
            "{filter} {}: {}",
            shown(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

/// Writes an archive in the format "newc", which kernels unpack (Documentation/driver-api/early-userspace/buffer-format
/// in Linux).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | mode, content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        // Magic, inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name length, check.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            len(content),
            0,
            0,
            0,
            0,
            len(name.as_bytes()) + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The format holds files below 4 GiB, and what goes into an initramfs is far below.
fn len(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/net/net_failover.ko.xz kernel/net/core/failover.ko.xz kernel/drivers/virtio/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/net/net_failover.ko.xz: kernel/net/core/failover.ko.xz
kernel/net/core/failover.ko.xz:
kernel/drivers/virtio/virtio.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/virtio/virtio_ring.ko.xz:
kernel/drivers/virtio/virtio_pci.ko.xz: kernel/drivers/virtio/virtio.ko.xz kernel/drivers/virtio/virtio_ring.ko.xz
";

    #[test]
    fn a_module_is_loaded_after_all_that_it_needs_and_once() {
        let order = load_order(DEPENDENCIES, "", &["virtio_pci", "virtio_net"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| module_name(path)).collect();
        assert_eq!(
            names,
            [
                "virtio_ring",
                "virtio",
                "virtio_pci",
                "failover",
                "net_failover",
                "virtio_net"
            ]
        );
    }

    #[test]
    fn built_in_modules_are_not_loaded_and_missing_ones_are_an_error() {
        assert!(
            load_order("", "kernel/drivers/virtio/virtio_pci.ko\n", &["virtio_pci"])
                .unwrap()
                .is_empty()
        );
        assert!(
            load_order("", "", &["virtio_pci"])
                .unwrap_err()
                .to_string()
                .contains("virtio_pci")
        );
    }

    #[test]
    fn entries_are_aligned_and_carry_their_length() {
        let mut cpio = Cpio::default();
        cpio.file("ab", 0o644, b"12345");
        let bytes = cpio.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005", "file size");
        // 110 bytes of header and "ab\0" end at 113; the content starts at the next multiple of four.
        assert_eq!(&bytes[116..121], b"12345");
        assert_eq!(&bytes[124..130], b"070701", "the next entry");
    }

    #[test]
    fn programs_that_need_an_interpreter_are_refused() {
        // One program header, right behind the file's own, of type PT_INTERP.
        let mut dynamic = vec![0; 64 + 56];
        dynamic[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (dynamic[32], dynamic[54], dynamic[56], dynamic[64]) = (64, 56, 1, 3);
        let refused = check_static(&dynamic).unwrap_err().to_string();
        assert!(refused.contains("crt-static"), "{refused}");
        dynamic[64] = 1;
        check_static(&dynamic).unwrap();
        assert!(check_static(b"#!/bin/sh\n").is_err());
        assert!(check_static(b"\x7fELF\x02\x01").is_err());
    }
}
