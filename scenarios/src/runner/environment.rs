//! What a lab runs on, for the report.

use anyhow::{Context as _, Result};

use crate::lab::{Accel, Lab};
use crate::report::Environment;

/// Asks the lab's own programs for their versions.
pub(super) async fn of(lab: &Lab, kubernetes: String, accel: Accel) -> Result<Environment> {
    let node = lab.nodes().next().context("a lab without nodes")?;
    let version = async |program: &str, flag: &str| -> Result<String> {
        let text = node.run(program, [flag]).await?;
        Ok(version_in(&text).unwrap_or_else(|| text.lines().next().unwrap_or("").to_owned()))
    };
    Ok(Environment {
        ovn: version("ovn-controller", "--version").await?,
        ovs: version("ovs-vswitchd", "--version").await?,
        qemu: version("qemu-system-x86_64", "--version").await?,
        libvirt: version("libvirtd", "--version").await?,
        kubernetes,
        accel: accel.as_str().to_owned(),
        cpus: std::thread::available_parallelism().map_or(0, usize::from),
        kernel: nix::sys::utsname::uname()
            .context("uname")?
            .release()
            .to_string_lossy()
            .into_owned(),
    })
}

/// The first word of a program's `--version` that begins as a version does.
fn version_in(text: &str) -> Option<String> {
    let starts_with_digit = |word: &&str| word.starts_with(|letter: char| letter.is_ascii_digit());
    let word = text.split_whitespace().find(starts_with_digit)?;
    Some(word.trim_end_matches([',', ')']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::version_in;

    #[test]
    fn versions_are_found_where_the_programs_put_them() {
        for (text, version) in [
            (
                "ovn-controller 25.03.0\nOpen vSwitch Library 3.5.0\n",
                Some("25.03.0"),
            ),
            ("ovs-vswitchd (Open vSwitch) 3.5.0\n", Some("3.5.0")),
            (
                "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n",
                Some("10.0.2"),
            ),
            ("libvirtd (libvirt) 11.3.0\n", Some("11.3.0")),
            ("no version at all\n", None),
        ] {
            assert_eq!(version_in(text).as_deref(), version);
        }
    }
}
