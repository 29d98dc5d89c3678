# An application whose stop drops no request. When an allocation is told to stop,
# Nomad deregisters its service at once and waits shutdown_delay before it signals
# the tasks: Roost takes the instance out within milliseconds, and what is in
# flight has that long to end. For a stop by hand, drain first, and be told when
# the instance is free:
#
#   roost drain "$(roost instances acme/web -o json | jq -r '.items[0].id')" && nomad alloc stop ALLOC
job "web" {
  datacenters = ["dc1"]

  group "web" {
    count          = 3
    shutdown_delay = "45s" # longer than the service's drain.timeout

    network {
      port "http" {}
    }

    service {
      name = "web"
      port = "http"
      meta {
        roost-tenant   = "acme"
        roost-port     = "80"
        roost-protocol = "http"
      }
      check {
        type     = "http"
        path     = "/healthz"
        interval = "2s"
        timeout  = "1s"
      }
    }

    task "web" {
      driver = "docker"
      config {
        image = "web:latest"
        ports = ["http"]
      }
    }
  }
}
