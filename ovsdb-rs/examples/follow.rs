//! Follows the databases of a server: `cargo run --example follow -- unix:/run/openvswitch/db.sock`.
//!
//! `_Server` is the one database that every `ovsdb-server` has (ovsdb-server(5)).

use std::env;
use std::error::Error;

use ovsdb_rs::{Client, ClientOptions, Endpoints, Event, Replica};

ovsdb_rs::table! {
    /// A database of the server.
    struct Database in "Database" {
        name: String,
        model: String,
        connected: bool,
        leader: bool,
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let endpoints: Endpoints = env::args()
        .nth(1)
        .ok_or("usage: follow ENDPOINT[,ENDPOINT…], such as unix:/run/ovn/ovnnb_db.sock")?
        .parse()?;
    let client = Client::connect(endpoints, ClientOptions::default()).await?;
    let replica = Replica::builder("_Server")
        .table::<Database>()
        .start(&client)?;
    replica.wait_synced().await?;
    let (snapshot, mut changes) = replica.subscribe();
    for (uuid, database) in snapshot.rows::<Database>() {
        println!("  {uuid} {database:?}");
    }
    while let Some(event) = changes.next().await {
        match event {
            Event::Changes(set) => {
                for change in set.of::<Database>() {
                    if let Some(old) = change.old {
                        println!("- {} {old:?}", change.uuid);
                    }
                    if let Some(new) = change.new {
                        println!("+ {} {new:?}", change.uuid);
                    }
                }
            }
            Event::Reset(snapshot) => {
                for (uuid, database) in snapshot.rows::<Database>() {
                    println!("= {uuid} {database:?}");
                }
            }
            _ => {}
        }
    }
    Ok(())
}
