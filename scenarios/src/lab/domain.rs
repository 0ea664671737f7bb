//! The libvirt domain of a guest.

use std::fmt::Write as _;

use super::guest::{Accel, GuestSpec};

/// What a domain boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Path of the kernel in the host.
    pub kernel: String,
    /// Path of the initramfs in the host.
    pub initramfs: String,
    /// Added to the kernel's command line.
    pub cmdline: String,
}

/// The domain's XML, the same on every node: interfaces are found by name, and every node names them alike.
///
/// ACPI and a HPET are what a guest finds timers of high resolution by: without them its clock ticks every 4 ms. QEMU's
/// `pc` has a HPET unless told otherwise; libvirt 9 refuses to be asked for it with a QEMU of after 8.0.
/// Without a memory balloon, a USB controller and option ROMs a small guest boots faster, and all offloads of the
/// interfaces are off because the userspace datapath does not finish checksums or cut up large segments.
pub fn xml(spec: &GuestSpec, boot: &Boot) -> String {
    let (kind, cpu) = match spec.accel {
        Accel::Tcg => (
            "qemu",
            "<cpu mode='custom' match='exact'><model>qemu64</model></cpu>",
        ),
        Accel::Kvm => ("kvm", "<cpu mode='host-model'/>"),
    };
    let mut interfaces = String::new();
    for nic in &spec.nics {
        // Writing to a string cannot fail.
        _ = write!(
            interfaces,
            "<interface type='ethernet'>\
               <mac address='{mac}'/><target dev='{tap}' managed='no'/><model type='virtio'/><rom enabled='no'/>\
               <driver>\
                 <host csum='off' gso='off' tso4='off' tso6='off' ecn='off' ufo='off'/>\
                 <guest csum='off' tso4='off' tso6='off' ecn='off' ufo='off'/>\
               </driver>\
             </interface>",
            mac = nic.mac,
            tap = escape(&nic.tap()),
        );
    }
    format!(
        "<domain type='{kind}'>\
           <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>{memory}</memory><vcpu>{vcpus}</vcpu>\
           <os><type arch='x86_64' machine='pc'>hvm</type>\
             <kernel>{kernel}</kernel><initrd>{initramfs}</initrd><cmdline>{cmdline}</cmdline></os>\
           <features><acpi/><apic/></features>{cpu}<clock offset='utc'/>\
           <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>\
           <devices>\
             <emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/>\
             {interfaces}\
             <serial type='file'><source path='{console}'/><target port='0'/></serial>\
             <serial type='unix'><source mode='bind' path='{shell}'/><target port='1'/></serial>\
             <memballoon model='none'/>\
           </devices>\
         </domain>",
        name = escape(&spec.name),
        uuid = spec.uuid,
        memory = spec.memory_mib,
        vcpus = spec.vcpus,
        kernel = escape(&boot.kernel),
        initramfs = escape(&boot.initramfs),
        cmdline = escape(&boot.cmdline),
        console = escape(&spec.console()),
        shell = escape(&spec.shell()),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::topology::Subnet;

    fn spec() -> GuestSpec {
        GuestSpec::new(
            "vm1",
            vec![Subnet(0).nic("vm1", 10), Subnet(1).nic("vm1.1", 10)],
        )
    }

    fn boot() -> Boot {
        Boot {
            kernel: "/boot/k".into(),
            initramfs: "/segue/i".into(),
            cmdline: "a='b' <c> & d".into(),
        }
    }

    #[test]
    fn every_interface_has_its_tap_and_address() {
        let xml = xml(&spec(), &boot());
        assert_eq!(xml.matches("<interface ").count(), 2);
        for expected in [
            "<target dev='vm1'",
            "<target dev='vm1.1'",
            "0a:58:0a:80:00:0a",
            "0a:58:0a:81:00:0a",
        ] {
            assert!(xml.contains(expected), "{expected} is not in {xml}");
        }
    }

    #[test]
    fn what_is_not_ours_cannot_break_out_of_its_element() {
        let xml = xml(&spec(), &boot());
        assert!(
            xml.contains("<cmdline>a=&apos;b&apos; &lt;c> &amp; d</cmdline>"),
            "{xml}"
        );
    }

    #[test]
    fn emulation_is_the_default_and_kvm_a_choice() {
        assert!(xml(&spec(), &boot()).starts_with("<domain type='qemu'>"));
        let kvm = GuestSpec {
            accel: Accel::Kvm,
            ..spec()
        };
        assert!(xml(&kvm, &boot()).starts_with("<domain type='kvm'>"));
    }
}
