//! PID 1 of a guest.

fn main() {
    if std::process::id() == 1 {
        nightgraft_vm_tests::guest::run()
    }
    eprintln!("vm_init is the first process of a guest and does nothing elsewhere");
    std::process::exit(2);
}
