//! Against a real `ovsdb-server`, without root: see `lab` for where it comes from.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests assert by panicking, in their helpers too"
)]

mod hostile;
mod lab;
mod locks;
mod proxy;
mod replica;
mod resync;
mod transactions;
