#![no_main]

use std::sync::OnceLock;

use nightgraft_agent::fuzzing::Server;

static SERVER: OnceLock<Server> = OnceLock::new();

libfuzzer_sys::fuzz_target!(|data: &[u8]| SERVER.get_or_init(Server::new).ask(data));
