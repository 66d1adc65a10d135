from medcot_utils.cli.main import main

main()
