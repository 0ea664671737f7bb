//! libvirt's remote protocol, as far as hearing events needs it.
//!
//! A client of libvirt's C library, such as `virsh`, hears of an event as late as its own event loop and whoever reads
//! its output allow, and `virsh event` does not tell when it has registered. Here an event is one read away from the
//! daemon's write, and a registration that was answered is in effect.
//!
//! The protocol is frames with a body in XDR (RFC 4506). Its numbers are fixed for good, because clients and daemons of
//! different versions meet: `src/remote/remote_protocol.x`, `src/remote/qemu_protocol.x` and
//! `src/rpc/virnetprotocol.x` in libvirt.
//!
//! # Guarantees
//! - Events come in the order in which the daemon sent them; none that comes after a registration is left out, up to 64
//!   that come before the next reply.
//! - Nothing that a daemon sends is a panic. A connection holds a megabyte at the most: 64 messages of 16 KiB.
//!
//! # Caveats
//! - No authentication: a daemon that asks for it (`auth_unix_rw`) refuses. Nor are its keepalive messages spoken, which
//!   it does not send to a client that has not asked for them: of a daemon that is frozen nothing is heard.

mod connection;
mod event;
mod xdr;

pub use connection::Connection;
pub use event::{Event, Happening};

/// Why nothing is heard.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be reached, read or written.
    #[error("the socket of libvirt")]
    Io(#[from] std::io::Error),
    /// The daemon closed the connection.
    #[error("libvirt closed the connection")]
    Closed,
    /// The daemon says no, with its number (`virErrorNumber`) and words.
    #[error("libvirt: {text}")]
    Refused {
        /// The number of its error.
        code: u32,
        /// Its words.
        text: String,
    },
    /// What it says is not the protocol.
    #[error("libvirt does not speak its protocol: {0}")]
    Malformed(&'static str),
}
